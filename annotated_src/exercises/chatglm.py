"""Exercises on the assembled ChatGLM: answers, bytes, and where two models part."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.loss import IGNORE

chapter = Chapter("chatglm/07_chatglm", "ChatGLM assembled")


@chapter.implement(
    title="how likely an answer is",
    minutes=12,
    difficulty="moderate",
    section="A small one that has learnt",
    text="""
Somebody has four words for a blank and wants to know which the model prefers. All four
went through the model, in one batch padded on the right. Give the probability of each
row's *whole* answer. `labels` holds the answer's pieces where they stand in the text,
and −100 (`IGNORE`) everywhere else; the first place is never asked for.
""",
    hints=(
        "What the model says at a place is about which piece: this one, or the next?",
        "Probabilities of pieces multiply, each given those before. Add their "
        "logarithms, leave out what is not asked for, and take the exponential last.",
    ),
    proves="Each row gets the product of its own pieces' probabilities, whatever its "
    "length and wherever its answer begins.",
    why="No mean: of two answers the longer one is the less likely, as it has more to "
    "get right. A mean would compare something else, the surprise a piece.",
    atol=1e-9,
)
def answer_chances(logits, labels):
    """(B, T, V), (B, T) -> (B,), a probability for each row."""
    chances = logits[:, :-1].log_softmax(dim=-1)
    asked = labels[:, 1:]
    chosen = chances.gather(-1, asked.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(asked == IGNORE, 0.0).sum(dim=-1).exp()


@answer_chances.cases
def _(draw):
    yield torch.tensor([[[0.0, 0], [2, 0], [0, 1]]]), torch.tensor([[IGNORE, 1, 0]])
    for spans, length, vocabulary in (
        ([(1, 3), (2, 6)], 6, 5),
        ([(3, 5), (3, 7), (2, 3)], 8, 4),
    ):
        labels = torch.full((len(spans), length), IGNORE)
        for row, (first, stop) in zip(labels, spans, strict=True):
            row[first:stop] = draw.integers(0, vocabulary, stop - first)
        yield 2 * draw.normal(len(spans), length, vocabulary), labels


answer_chances.equivalent(
    "return chosen.masked_fill(asked == IGNORE, 0.0).sum(dim=+1).exp()",
    because="of two axes, 1 is the last",
)
answer_chances.equivalent(
    "chosen = chances.gather(-1, asked.clamp(min=0)[..., None])[..., -1]",
    because="of one entry, the first is the last",
)


@answer_chances.also("loops")
def _(logits, labels):
    found = []
    for scores, row in zip(logits, labels.tolist(), strict=True):
        chance = 1.0
        for t, piece in enumerate(row):
            if piece != IGNORE:
                chance *= scores[t - 1].softmax(0)[piece].item()
        found.append(chance)
    return torch.tensor(found)


@answer_chances.also("torch.nn")
def _(logits, labels):
    loss = torch.nn.CrossEntropyLoss(reduction="none", ignore_index=IGNORE)
    return (-loss(logits[:, :-1].mT, labels[:, 1:]).sum(dim=-1)).exp()


@answer_chances.also("one of each vocabulary")
def _(logits, labels):
    chances = logits.softmax(-1)[:, :-1]
    pieces = torch.arange(logits.shape[-1])
    is_asked = labels[:, 1:, None] == pieces
    chosen = (chances * is_asked).sum(-1)
    return torch.where(is_asked.any(-1), chosen, 1.0).prod(-1)


def chosen_pieces(logits, labels):
    """Give log-probabilities of the next pieces, and where they are asked for."""
    chances, asked = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    chosen = chances.gather(-1, asked.clamp(min=0)[..., None])[..., 0]
    return chosen, asked != IGNORE


@answer_chances.mistake(
    "no shift",
    because="labels and logits have the same places; but what a model says at one "
    "place is about the next",
)
def _(logits, labels):
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == IGNORE, 0.0).sum(-1).exp()


@answer_chances.mistake(
    "shifted the other way",
    because="one of the two must lose its first place, and it is easy to take the "
    "logits",
)
def _(logits, labels):
    chances, asked = logits[:, 1:].log_softmax(-1), labels[:, :-1]
    chosen = chances.gather(-1, asked.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(asked == IGNORE, 0.0).sum(-1).exp()


@answer_chances.mistake(
    "the mean of the pieces",
    because="a loss is a mean, and its exponential looks like a probability; it is "
    "that of one average piece",
)
def _(logits, labels):
    chosen, asked = chosen_pieces(logits, labels)
    return ((chosen * asked).sum(-1) / asked.sum(-1)).exp()


@answer_chances.mistake(
    "probabilities added",
    because="the logarithms are added; the probabilities themselves multiply",
)
def _(logits, labels):
    chosen, asked = chosen_pieces(logits, labels)
    return (chosen.exp() * asked).sum(-1)


@answer_chances.mistake(
    "−100 taken for piece 0",
    because="`gather` cannot take −100, so it is clamped to 0, and then forgotten; "
    "padding and prompt now count as pieces that the answer must get right",
)
def _(logits, labels):
    return chosen_pieces(logits, labels)[0].sum(-1).exp()


@answer_chances.mistake(
    "softmax over places",
    because="the last axis but one has the pieces of the answer in it; the model "
    "chooses among the vocabulary, one place at a time",
)
def _(logits, labels):
    chances, asked = logits[:, :-1].log_softmax(dim=1), labels[:, 1:]
    chosen = chances.gather(-1, asked.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(asked == IGNORE, 0.0).sum(-1).exp()


@answer_chances.mistake(
    "the first row's places for all",
    because="rows of a batch are alike while one tries it out, with answers of one "
    "length at one place",
)
def _(logits, labels):
    chosen, asked = chosen_pieces(logits, labels)
    return (chosen * asked[:1]).sum(-1).exp()


@answer_chances.mistake(
    "scores for log-probabilities",
    because="the larger score wins, so scores look like log-probabilities; they are so "
    "only up to a constant, another one at every place",
)
def _(logits, labels):
    asked = labels[:, 1:]
    chosen = logits[:, :-1].gather(-1, asked.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(asked == IGNORE, 0.0).sum(-1).exp()


@chapter.debug(
    title="where two models part",
    minutes=8,
    difficulty="moderate",
    section="The ladder of equality",
    text="""
Two models should be the same, and are not. You have a record of what each of their
parts put out, as dictionaries from name to tensor, in the order of computing. This
function names the first part that differs: in its shape, or in some number by more than
`atol`. If none does, it gives an empty text. It found every difference but one: the
model that wrote nonsense from its first token on, it called sound. Mend it.
""",
    hints=(
        "What kind of nonsense may stand in a tensor, so that no number is too far "
        "away?",
        "Ask Python: is NaN greater than 0.1? Is it at most 0.1?",
    ),
    proves="The first part that differs is named, whether by shape, by a number "
    "either way, or because it is no number at all.",
    why="A comparison with NaN is False, whichever way round. So ask for what shall "
    "be true (all are near) and not for what shall not (one is far). If a record may "
    "hold infinities, ask `torch.allclose(..., rtol=0, atol=atol)`, for which two of a "
    "sign are equal: their difference is NaN.",
)
def first_difference(right, wrong, atol):
    """Two records and a tolerance -> a name, or nothing."""
    for name in right:
        if right[name].shape != wrong[name].shape:
            return name
        difference = (right[name] - wrong[name]).abs()
        if not (difference <= atol).all():
            return name
    return ""


@first_difference.broken(
    "nothing is greater than NaN",
    because="a difference is looked for where something is greater than the tolerance; "
    "every comparison with NaN is False",
)
def _(right, wrong, atol):
    for name in right:
        if right[name].shape != wrong[name].shape:
            return name
        difference = (right[name] - wrong[name]).abs()
        if (difference > atol).any():
            return name
    return ""


@first_difference.cases
def _(draw):
    one = {"embedding": torch.ones(2), "norm": torch.ones(2)}
    yield one, one | {"norm": torch.tensor([1.0, torch.nan])}, 0.1
    yield (
        one,
        one | {"embedding": torch.tensor([1.0, 1.5]), "norm": 3 * one["norm"]},
        0.1,
    )
    yield one, one | {"norm": torch.tensor([1.0, 1.15])}, 0.1
    yield one, one | {"norm": torch.ones(1)}, 0.1
    yield one, {name: x + 0.05 for name, x in one.items()}, 0.1
    yield one, one | {"norm": torch.tensor([0.5, 1.5])}, 0.1
    yield one, one | {"norm": torch.tensor([0.5, 1.5])}, 0.5  # and no more than that
    names = ["embedding", "blocks.1", "blocks.2", "blocks.10", "norm"]
    record = {name: draw.normal(3, 4) for name in names}
    yield record, dict(record), 1e-6
    spoilt = {name: x + 1 for name, x in record.items() if name[-1] in "20m"}
    yield record, record | spoilt, 1e-3
    loud = record | {"blocks.10": 50_000 + record["blocks.10"].round()}
    off = loud["blocks.10"] + torch.tensor([0.125, 0.0, 0.0, 0.0])
    yield loud, loud | {"blocks.10": off}, 1e-2
    yield record, record | {"blocks.1": record["blocks.1"].flip(0)}, 1e-3


@first_difference.also("torch.allclose")
def _(right, wrong, atol):
    for name, x in right.items():
        y = wrong[name]
        if x.shape != y.shape or not torch.allclose(x, y, rtol=0, atol=atol):
            return name
    return ""


@first_difference.also("a loop over numbers")
def _(right, wrong, atol):
    for name, x in right.items():
        if x.shape != wrong[name].shape:
            return name
        pairs = zip(x.flatten().tolist(), wrong[name].flatten().tolist(), strict=True)
        if any(math.isnan(a - b) or abs(a - b) > atol for a, b in pairs):
            return name
    return ""


def wrong_search(agree, by_name=False, shapes=True, last=False):
    """Make a search with another comparison, order, or end."""

    def search(right, wrong, atol):
        found = ""
        for name in sorted(right) if by_name else right:
            x, y = right[name], wrong[name]
            if (shapes and x.shape != y.shape) or not agree(x, y, atol):
                if not last:
                    return name
                found = name
        return found

    return search


def near(x, y, atol):
    """Say whether all numbers are near."""
    return bool(((x - y).abs() <= atol).all())


first_difference.mistake(
    "the sign left on",
    because="`(right - wrong).max()` reads as the largest difference; where `wrong` "
    "is the larger one, it is negative",
)(wrong_search(lambda x, y, atol: bool((x - y <= atol).all())))
first_difference.mistake(
    "the mean of the differences",
    because="one number for a tensor seems enough, and differences either way cancel",
)(wrong_search(lambda x, y, atol: bool((x - y).mean().abs() <= atol)))
first_difference.mistake(
    "the mean distance",
    because="distances do not cancel, so their mean looks safe; one number that is far "
    "off drowns among many that are near",
)(wrong_search(lambda x, y, atol: bool((x - y).abs().mean() <= atol)))
first_difference.mistake(
    "only the lengths compared",
    because="norms are short to print; the same numbers in another order have the same",
)(wrong_search(lambda x, y, atol: bool((x.norm() - y.norm()).abs() <= atol)))
first_difference.mistake(
    "allclose as it comes",
    because="`atol` is what one gives it; a relative tolerance of 0.00001 comes with "
    "it unasked, which at 50,000 is half a unit",
)(wrong_search(lambda x, y, atol: torch.allclose(x, y, atol=atol)))
first_difference.mistake(
    "in the order of the names",
    because="sorted names look like the order of the model; `blocks.10` comes before "
    "`blocks.2`",
    section="Loading, as it was published",
)(wrong_search(near, by_name=True))
first_difference.mistake(
    "the last part that differs",
    because="a loop that writes down each find ends with the last; behind the first "
    "one all differ, and only the first says where to look",
)(wrong_search(near, last=True))
first_difference.mistake(
    "shapes left to the subtraction",
    because="tensors of different shapes should fail to subtract; a size of 1 is "
    "stretched",
)(wrong_search(near, shapes=False))


chapter.explain(
    "what_causal_hides",
    title="what the causal mask hides",
    minutes=5,
    difficulty="moderate",
    section="What it puts in a blank",
    text="""
Under Llama's causal mask the chapter's model answers about as well as before, at either
blank. What exactly does the causal mask hide that the original's shows, and when does
it matter?
""",
    hints=(
        "Write down who sees whom, for a context of three tokens and an answer of two, "
        "under both masks. In which rows do they differ?",
        "Not in the answer's rows. So the answer can only notice by what the context's "
        "tokens have become.",
    ),
    choices={
        "a": Choice(
            "From the answer, the context behind the blank; so it matters when words "
            "after the blank decide.",
            "The answer stands behind *all* of the context, wherever in it the blank "
            "is. It sees the words after the blank under either mask.",
        ),
        "b": Choice(
            "From each token of the context, those behind it; it matters to a model "
            "that reads words differently for what comes after them.",
            "To the answer it hides nothing. What changes is the context itself: "
            "$c(c-1)/2$ pairs of a context of $c$. It matters only if a word's vector "
            "comes out differently for what follows and passes that on. Otherwise the "
            "answer asks each word itself.",
        ),
        "c": Choice(
            "From the answer's pieces, those of the answer before them; so it matters "
            "for long answers.",
            "Those are visible under both. What lies *ahead* in the answer is hidden "
            "under both as well.",
        ),
        "d": Choice(
            "Nothing, since a new token always sees all before it: the masks are "
            "equal.",
            "For the new token's own row that is so. But the context's rows are "
            "computed under the mask too, and there the two differ.",
        ),
    },
    right="b",
)


@chapter.implement(
    title="bytes in memory",
    minutes=10,
    difficulty="moderate",
    section="The 6B model by numbers",
    text=r"""
How many bytes do the weights of a ChatGLM take, in 16, 8 or 4 bits? The feed-forward
network is four times as wide as the model, and the head is the embedding. In 8 and 4
bits the *matrices of the blocks* are rounded, with one scale in float16 for each of
their rows; a row makes one output. All else stays in float16: embedding, biases, norms.
""",
    hints=(
        "List a block's four matrices with rows and columns. How many rows is that, "
        "and so how many biases and scales?",
        "$3D$, $D$, $4D$ and $D$ rows, and $12D^2$ numbers. Besides the biases of "
        "these rows, a block has two norms with a gain and a bias each; one more norm "
        "stands at the end.",
    ),
    proves="Every tensor is counted with its own width, for models of any size.",
    why="For the 6B model that is 12.35, 6.71 and 3.89 GB. The embedding, 1.07 GB, is "
    "in each of them, so that 4 bits make it 3.2 times smaller and not 4.",
)
def chatglm_bytes(vocab_size, embed_dim, num_layers, bits):
    """Count the bytes, an int."""
    matrices = 12 * embed_dim**2 * bits // 8
    biases_and_norms = 2 * 13 * embed_dim
    scales = 0 if bits == 16 else 2 * 9 * embed_dim
    block = matrices + biases_and_norms + scales
    return 2 * vocab_size * embed_dim + num_layers * block + 4 * embed_dim


@chatglm_bytes.cases
def _(draw):
    for bits in (8, 16, 4):
        yield 5, 4, 2, bits
    for bits in (16, 8, 4):
        yield 130528, 4096, 28, bits
    yield draw.integer(50, 99), 2 * draw.integer(10, 40), draw.integer(2, 9), 4


@chatglm_bytes.also("matrix by matrix")
def _(vocab_size, embed_dim, num_layers, bits):
    total = vocab_size * embed_dim * 2 + 2 * embed_dim * 2
    for _ in range(num_layers):
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            rows, columns = rows * embed_dim, columns * embed_dim
            total += rows * columns * bits // 8 + rows * 2
            total += rows * 2 if bits < 16 else 0
        total += 2 * 2 * embed_dim * 2
    return total


@chatglm_bytes.also("from the count of parameters")
def _(vocab_size, embed_dim, num_layers, bits):
    in_blocks = num_layers * (12 * embed_dim**2 + 13 * embed_dim)
    total = 2 * (vocab_size * embed_dim + in_blocks + 2 * embed_dim)
    total -= num_layers * 12 * embed_dim**2 * (16 - bits) // 8
    return total + (2 * 9 * embed_dim * num_layers if bits < 16 else 0)


def wrong_bytes(
    scales=lambda d: 9 * d,
    scale_bytes=2,
    extra=lambda v, d, n, bits: 0,
    at_16=False,
):
    """Make a count with other scales, or bytes too many or too few."""

    def count(vocab_size, embed_dim, num_layers, bits):
        block = 12 * embed_dim**2 * bits // 8 + 26 * embed_dim
        block += scale_bytes * scales(embed_dim) if bits < 16 or at_16 else 0
        total = 2 * vocab_size * embed_dim + num_layers * block + 4 * embed_dim
        return total + extra(vocab_size, embed_dim, num_layers, bits)

    return count


chatglm_bytes.mistake(
    "the embedding rounded too",
    because="a model in 4 bits is thought to have 4 bits everywhere; ChatGLM-6B "
    "rounds the matrices of its blocks",
)(wrong_bytes(extra=lambda v, d, n, bits: v * d * bits // 8 - 2 * v * d))
chatglm_bytes.mistake(
    "no scales",
    because="a number in 8 bits takes one byte; but nobody can read it without its "
    "row's scale",
)(wrong_bytes(scales=lambda d: 0))
chatglm_bytes.mistake(
    "one scale a matrix",
    because="the simplest way to round has one scale for a whole tensor",
)(wrong_bytes(scales=lambda d: 4))
chatglm_bytes.mistake(
    "a scale for each column",
    because="a matrix has two axes, and as inputs and outputs are both called "
    "features, either looks like the one; here it is the rows, which make the outputs",
)(wrong_bytes(scales=lambda d: 7 * d))
chatglm_bytes.mistake(
    "biases rounded too",
    because="they belong to the same layers; rounding them would save next to nothing",
)(wrong_bytes(extra=lambda v, d, n, bits: n * (9 * d * bits // 8 - 18 * d)))
chatglm_bytes.mistake(
    "the head counted again",
    because="the files hold it, as a tensor of its own; in memory it is the embedding",
    section="Counting the parameters",
)(wrong_bytes(extra=lambda v, d, n, bits: 2 * v * d))
chatglm_bytes.mistake(
    "the last norm forgotten",
    because="a block has two norms, and one counts blocks; one more norm stands behind "
    "them all",
    section="Counting the parameters",
)(wrong_bytes(extra=lambda v, d, n, bits: -4 * d))
chatglm_bytes.mistake(
    "scales for 16 bits",
    because="the formula has a term for them; float16 numbers need none",
)(wrong_bytes(at_16=True))
chatglm_bytes.mistake(
    "scales in float32",
    because="many libraries keep their scales in four bytes; these are float16",
)(wrong_bytes(scale_bytes=4))
