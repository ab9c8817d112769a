"""Exercises on Llama assembled: the block, the first difference, who voted."""

import functools

import torch
from torch.nn import functional as F

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/08_llama", "Llama assembled")


@chapter.implement(
    title="a block adds twice",
    minutes=8,
    difficulty="moderate",
    section="Block, stack, ends",
    text="""
Put a block together, from memory. So that you see every number, its two parts are as
simple as can be: attention is a table that mixes tokens, `mixing @ x`, and feed-forward
treats each token alone, `F.silu(x @ weight)`. The norm is
`F.rms_norm(x, x.shape[-1:], gain, 1e-5)`, with a gain for each of the two.
""",
    hints=(
        "Nothing ever overwrites the stream. What does each part read, and to what is "
        "its output added?",
        "The second norm reads the stream *after* attention has added to it, and the "
        "feed-forward part adds to that same stream.",
    ),
    proves="The block normalises what each part reads, and adds what each part puts "
    "out to the stream as it then is.",
)
def residual_block(x, attention_gain, mixing, ffn_gain, weight):
    """(B, T, D), (D,), (T, T), (D,), (D, D) -> (B, T, D), as Llama's block does."""
    h = x + mixing @ F.rms_norm(x, x.shape[-1:], attention_gain, 1e-5)
    return h + F.silu(F.rms_norm(h, x.shape[-1:], ffn_gain, 1e-5) @ weight)


@residual_block.cases
def _(draw):
    x, weight = ((4 * draw.normal(2, 2)).round() / 4 for _ in range(2))
    gains = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.75])
    yield x[None], gains[0], torch.tensor([[1.0, 0], [0.25, 0.75]]), gains[1], weight
    # The last stream is so small that the epsilon under the root counts.
    for batch, tokens, width, size in ((2, 3, 5, 1), (3, 4, 2, 2), (1, 3, 3, 0.005)):
        x = size * draw.normal(batch, tokens, width)
        mixing = draw.uniform(tokens, tokens, low=0.2, high=1.0).tril()
        mixing = mixing / mixing.sum(dim=-1, keepdim=True)
        gains = draw.uniform(2, width, low=0.5, high=2.0)
        yield x, gains[0], mixing, gains[1], draw.normal(width, width)


@residual_block.also("loops over tokens")
def _(x, attention_gain, mixing, ffn_gain, weight):
    def norm(row, gain):
        return gain * row / (row.square().mean() + 1e-5).sqrt()

    out = torch.empty_like(x)
    for b, rows in enumerate(x):
        normed = [norm(row, attention_gain) for row in rows]
        for t, row in enumerate(rows):
            mixed = sum(mixing[t, s] * normed[s] for s in range(len(rows)))
            row = row + mixed
            pushed = norm(row, ffn_gain) @ weight
            out[b, t] = row + pushed * torch.sigmoid(pushed)
    return out


@residual_block.also("torch.nn modules and a sum of what was written")
def _(x, attention_gain, mixing, ffn_gain, weight):
    norm = torch.nn.RMSNorm(x.shape[-1], eps=1e-5)
    wrote = []
    with torch.no_grad():
        norm.weight.copy_(attention_gain)
        wrote.append(torch.einsum("ts,bsd->btd", mixing, norm(x)))
        norm.weight.copy_(ffn_gain)
        wrote.append(torch.nn.SiLU()(norm(x + wrote[0]) @ weight))
    return x + wrote[0] + wrote[1]


def normed(x, gain):
    """Normalise as Llama does: (..., D) -> (..., D)."""
    return F.rms_norm(x, x.shape[-1:], gain, 1e-5)


@residual_block.mistake(
    "norm after the sum",
    because="the first transformer, and most drawings of it, put the norm behind: "
    "“add & norm”. Llama normalises what a part reads, and never the stream itself",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    h = normed(x + mixing @ x, attention_gain)
    return normed(h + F.silu(h @ weight), ffn_gain)


@residual_block.mistake(
    "the second norm reads attention's output",
    because="its name in transformers is `post_attention_layernorm`. It comes after "
    "attention, and reads the stream that attention has added to",
    section="The ladder of equality, layer by layer",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    mixed = mixing @ normed(x, attention_gain)
    return x + mixed + F.silu(normed(mixed, ffn_gain) @ weight)


@residual_block.mistake(
    "the stream restarts at the norm",
    because="`x = norm(x)` saves a name, and what is added to is then the normed "
    "vector. ChatGLM-6B does this on purpose; Llama does not",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    x = normed(x, attention_gain)
    x = x + mixing @ x
    x = normed(x, ffn_gain)
    return x + F.silu(x @ weight)


@residual_block.mistake(
    "both parts side by side",
    because="some models run attention and feed-forward on the same input, and one sum "
    "looks like two",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    pushed = F.silu(normed(x, ffn_gain) @ weight)
    return x + mixing @ normed(x, attention_gain) + pushed


@residual_block.mistake(
    "attention's output dropped from the stream",
    because="both lines begin with `x +`, and the second x should already hold what "
    "attention has added",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    h = x + mixing @ normed(x, attention_gain)
    return x + F.silu(normed(h, ffn_gain) @ weight)


@residual_block.mistake(
    "gains exchanged",
    because="both have the same shape, so no loader and no product complains",
    section="The ladder of equality, layer by layer",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    h = x + mixing @ normed(x, ffn_gain)
    return h + F.silu(normed(h, attention_gain) @ weight)


@residual_block.mistake(
    "nothing is added",
    because="“the output of one part is the input of the next” holds for most "
    "programs; here the stream is the only thing that goes on",
)
def _(x, attention_gain, mixing, ffn_gain, weight):
    h = mixing @ normed(x, attention_gain)
    return F.silu(normed(h, ffn_gain) @ weight)


@chapter.implement(
    title="where two models part",
    minutes=10,
    difficulty="moderate",
    section="The ladder of equality, layer by layer",
    text="""
Two models were hooked in the same places, in the order in which a token passes them:
`ours` and `theirs` hold what left each place. Return the name of the first place where
they differ, or `None`. They differ where the largest difference is more than `bound`
times the largest number *there*, in size, of `theirs`.
""",
    hints=(
        "Everything after the first difference differs too. So how large a difference "
        "is does not tell where it came from.",
        "A difference of -1 is as large as one of 1. Compare two numbers a place: a "
        "largest difference and a largest size.",
    ),
    proves="The first place is found, however small its difference is beside later "
    "ones, with signs, sizes and numbers near zero of every kind.",
)
def where_models_part(ours, theirs, bound):
    """{place: tensor} twice, float -> str, or None if all places agree."""
    for place, expected in theirs.items():
        if (ours[place] - expected).abs().max() > bound * expected.abs().max():
            return place
    return None


def recorded(draw, size, *shape):
    """Draw a record: its largest number is `size`, its last one zero."""
    x = draw.normal(*shape)
    x = size * x / x.abs().max()
    x.view(-1)[-1] = 0.0
    return x


def moved(x, by, at=0):
    """Copy a record, one number moved."""
    other = x.clone()
    other.view(-1)[at] += by
    return other


@where_models_part.cases
def _(draw):
    place = functools.partial(recorded, draw)
    one = {"embedding": place(1, 3), "blocks.0": place(1, 3), "norm": place(1, 3)}
    yield one, one, 1e-3
    yield one | {"norm": moved(one["norm"], -0.1)}, one, 1e-3
    later = {"blocks.0": moved(one["blocks.0"], 0.01), "norm": moved(one["norm"], 0.9)}
    yield one | later, one, 1e-3
    # 0.75 is more than half of 1, though not of 1.75, of 4, or of a length of 2.
    for by, before in ((0.75, 0.0), (-0.75, 4.0)):
        right = {"attention": torch.tensor([before]), "ffn": torch.tensor([1.0, 0.0])}
        yield right | {"ffn": moved(right["ffn"], by)}, right, 0.5
    right = {"ffn": torch.ones(4)}
    yield {"ffn": moved(right["ffn"], -0.75)}, right, 0.5
    # 1 is no more than half of 4, whatever the sign, the mean and the range are.
    rows = [4.0, 1.0], [-4.0, 1.0], [4.0, 3.0], [-4.0, 0.0, 0.0]
    names = "embedding", "attention", "ffn", "norm"
    right = dict(zip(names, map(torch.tensor, rows), strict=True))
    yield {name: moved(x, 1.0, -1) for name, x in right.items()}, right, 0.5
    right = {"norm": torch.tensor([1.0, -2.0])}
    yield {"norm": -right["norm"]}, right, 0.5
    # Zeros that are nearly zero: 1e-5 beside numbers up to 1 is no difference.
    yield {x: moved(one[x], 1e-5, -1) for x in one}, one, 1e-3


@where_models_part.cases
def _(draw):
    place = functools.partial(recorded, draw)
    # Sizes of 1000, as in a real stream: 0.1 is little there; and sizes of 0.001.
    large = {f"blocks.{i}": place(1000, 2, 4) for i in range(3)}
    yield {x: moved(large[x], 0.1) for x in large}, large, 1e-3
    small = {"attention": place(1e-3, 2, 4), "ffn": place(1e-3, 2, 4)}
    yield small | {"ffn": moved(small["ffn"], 1e-4)}, small, 1e-3
    # A bias that nobody has trained yet: zeros in both.
    zeros = {"bias": torch.zeros(4), "norm": place(1, 4)}
    yield zeros | {"norm": moved(zeros["norm"], 0.1)}, zeros, 1e-3
    # Twelve blocks in the model's order, which is not the alphabet's.
    many = {f"blocks.{i}": place(1, 2, 3) for i in range(12)}
    yield {x: moved(many[x], 0.1 if int(x[7:]) > 1 else 0) for x in many}, many, 1e-3
    # One number of sixty-four.
    wide = {"gate": place(1, 8, 8), "up": place(1, 8, 8)}
    yield wide | {"up": moved(wide["up"], 0.01)}, wide, 1e-3


@where_models_part.also("the first of a list")
def _(ours, theirs, bound):
    pairs = [(name, ours[name], x) for name, x in theirs.items()]
    found = [n for n, a, b in pairs if (a - b).abs().amax() > b.abs().amax() * bound]
    return found[0] if found else None


@where_models_part.also("plain numbers")
def _(ours, theirs, bound):
    for name in theirs:
        mine, yours = ours[name].flatten().tolist(), theirs[name].flatten().tolist()
        apart = max(abs(a - b) for a, b in zip(mine, yours, strict=True))
        if apart > bound * max(map(abs, yours)):
            return name


@where_models_part.also("allclose, with a tolerance made for each place")
def _(ours, theirs, bound):
    for name, x in theirs.items():
        if not torch.allclose(ours[name], x, rtol=0, atol=float(bound * x.abs().max())):
            return name
    return None


def wrong_search(differ, names=iter):
    """Make a where_models_part with another test, or another order of places."""

    def search(ours, theirs, bound):
        for place in names(theirs):
            if differ(ours[place], theirs[place], bound):
                return place
        return None

    return search


def apart(mine, yours, bound):
    """Say whether two tensors differ, as the task wants it."""
    return (mine - yours).abs().max() > bound * yours.abs().max()


@where_models_part.mistake(
    "the largest difference",
    because="the worst place looks like the culprit. But an error grows on its way, "
    "and is largest far behind the place where it began",
)
def _(ours, theirs, bound):
    apart = {name: (ours[name] - x).abs().max() for name, x in theirs.items()}
    worst = max(apart, key=lambda name: apart[name])
    return worst if apart[worst] > bound * theirs[worst].abs().max() else None


where_models_part.mistake(
    "an absolute bound",
    because="0.001 sounds small. Whether it is depends on the numbers: a stream may be "
    "in the thousands, or in the thousandths",
)(wrong_search(lambda a, b, bound: (a - b).abs().max() > bound))
where_models_part.mistake(
    "a difference with its sign",
    because="a large difference is a large number; but one of -1 is not a small one",
)(wrong_search(lambda a, b, bound: (a - b).max() > bound * b.abs().max()))
where_models_part.mistake(
    "each number beside its own",
    because="`allclose` with `rtol` does so. A number that is zero but for rounding "
    "then counts as wrong by a hundred per cent",
)(wrong_search(lambda a, b, bound: ((a - b).abs() > bound * b.abs()).any()))
where_models_part.mistake(
    "the mean difference",
    because="a mean looks at all numbers. One that is wrong disappears among many that "
    "are right",
)(wrong_search(lambda a, b, bound: (a - b).abs().mean() > bound * b.abs().max()))
where_models_part.mistake(
    "sizes with their sign",
    because="the largest number sounds like `max()`. The one that is largest in size "
    "may be negative, and then `max()` does not see it",
)(wrong_search(lambda a, b, bound: (a - b).abs().max() > bound * b.max()))
where_models_part.mistake(
    "signs lost too early",
    because="sizes are to be compared, so `abs()` comes first; then 1 and -1 are equal",
)(
    wrong_search(
        lambda a, b, bound: (a.abs() - b.abs()).abs().max() > bound * b.abs().max()
    )
)
where_models_part.mistake(
    "measured by ours",
    because="a ratio may be taken to either side. But if ours is what went wrong, it "
    "may have grown, and excuses itself",
)(wrong_search(lambda a, b, bound: (a - b).abs().max() > bound * a.abs().max()))
where_models_part.mistake(
    "lengths of vectors",
    because="`norm()` sums up how far two tensors are apart, and works for both. One "
    "number that is wrong is short beside a long vector",
)(wrong_search(lambda a, b, bound: (a - b).norm() > bound * b.norm()))


@where_models_part.mistake(
    "one yardstick for all places",
    because="a model seems to have one scale. A stream in the thousands would then "
    "allow anything in a part whose numbers are small",
)
def _(ours, theirs, bound):
    largest = max(x.abs().max() for x in theirs.values())
    for place, x in theirs.items():
        if (ours[place] - x).abs().max() > bound * largest:
            return place
    return None


where_models_part.mistake(
    "places in the alphabet's order",
    because="sorting makes both lists come in one order, and it does; but blocks.10 "
    "then stands before blocks.2",
)(wrong_search(apart, names=sorted))


@where_models_part.mistake(
    "the last place that differs",
    because="a loop that remembers what it found keeps the last find, which is where "
    "the error ended up and not where it began",
)
def _(ours, theirs, bound):
    found = None
    for place in theirs:
        if apart(ours[place], theirs[place], bound):
            found = place
    return found


@chapter.debug(
    title="which head voted?",
    minutes=15,
    difficulty="hard",
    section="Reading the stream",
    text=r"""
Attention's output is a sum over heads. `heads` holds the outputs of all heads for one
token, side by side; the `weight` of `out_proj` makes of them what is added to the
stream; and `direction` says what of the stream counts for one word. So each head has a
vote of its own, and the votes add up to `direction @ (weight @ heads)`. Somebody's
votes do not. In a model with $NH = D$ nothing complains. Mend them.
""",
    hints=(
        "In which axis of the weight do the heads stand? `nn.Linear` keeps (out, in), "
        "and computes `weight @ x`.",
        "Each head meets its own H *columns* of the matrix, and may write to the whole "
        "stream.",
    ),
    proves="Each head gets the vote of its own columns; the votes add up to what "
    "attention put out, in models where N H is D and where it is not.",
    why="A product with a matrix is a sum over its columns. Heads stand side by side "
    "in what `out_proj` reads, so each owns a block of columns.",
)
def head_votes(heads, weight, direction, head_dim):
    """(N * H,), (D, N * H), (D,), H -> (N,): what each head adds along direction."""
    votes = []
    for head, columns in zip(
        heads.split(head_dim), weight.split(head_dim, dim=1), strict=True
    ):
        votes.append(direction @ (columns @ head))
    return torch.stack(votes)


@head_votes.broken(
    "rows for columns",
    because="`split` takes rows unless it is told otherwise, and a square matrix has "
    "as many of both",
)
def _(heads, weight, direction, head_dim):
    votes = []
    for head, rows in zip(heads.split(head_dim), weight.split(head_dim), strict=True):
        votes.append(head @ rows @ direction)
    return torch.stack(votes)


head_votes.equivalent(
    "heads.split(head_dim), weight.split(head_dim, dim=1), strict=False",
    because="there are as many blocks of columns as heads",
)


@head_votes.mistake(
    "each head writes to its own slice",
    because="heads come side by side in what `out_proj` reads. What it writes is "
    "mixed: every head may write to the whole stream. The sum is right all the same",
)
def _(heads, weight, direction, head_dim):
    written = (weight @ heads) * direction
    return torch.stack([part.sum() for part in written.split(head_dim)])


@head_votes.mistake(
    "features of heads interleaved",
    because="`view(head_dim, -1)` has the right number of numbers; but a head's "
    "features are neighbours: head 0 has the first H",
)
def _(heads, weight, direction, head_dim):
    shares = (direction @ weight) * heads
    return shares.view(head_dim, -1).sum(dim=0)


@head_votes.mistake(
    "votes without a sign",
    because="strength seems to be what counts. A head may vote against a word, and the "
    "sum needs to know",
)
def _(heads, weight, direction, head_dim):
    return ((direction @ weight) * heads).view(-1, head_dim).sum(dim=1).abs()


@head_votes.mistake(
    "the direction made one long",
    because="a direction sounds like a unit vector. This one carries the gain and the "
    "root of the last norm, and without them the votes are no logits",
)
def _(heads, weight, direction, head_dim):
    unit = direction / direction.norm()
    return ((unit @ weight) * heads).view(-1, head_dim).sum(dim=1)


@head_votes.mistake(
    "equal shares",
    because="what heads have put out is mixed by one matrix, and a mixture seems past "
    "taking apart. It is a sum, and sums come apart",
)
def _(heads, weight, direction, head_dim):
    count = heads.shape[0] // head_dim
    return (direction @ weight @ heads / count).repeat(count)


@head_votes.mistake(
    "the matrix turned over",
    because="in formulas x often stands in front, x W; `nn.Linear` keeps W turned "
    "over. With a square matrix both products exist",
)
def _(heads, weight, direction, head_dim):
    return ((weight @ direction) * heads).view(-1, head_dim).sum(dim=1)


@head_votes.cases
def _(draw):
    for count, head_dim, width in ((2, 2, 4), (3, 2, 5), (2, 4, 8), (4, 3, 7)):
        heads = draw.normal(count * head_dim)
        yield heads, draw.normal(width, len(heads)), draw.normal(width), head_dim


@head_votes.also("the direction first, then sums of neighbours")
def _(heads, weight, direction, head_dim):
    return ((direction @ weight) * heads).view(-1, head_dim).sum(dim=1)


@head_votes.also("all other heads silenced")
def _(heads, weight, direction, head_dim):
    votes = []
    for start in range(0, len(heads), head_dim):
        alone = torch.zeros_like(heads)
        alone[start : start + head_dim] = heads[start : start + head_dim]
        votes.append(direction @ (weight @ alone))
    return torch.stack(votes)


chapter.explain(
    "what_shrank_attention",
    title="where the parameters went",
    minutes=5,
    difficulty="moderate",
    section="Counting the parameters",
    text="""
Llama-2-7B spends 31.9 % of its parameters on attention, Llama-2-70B 17.5 %. What did
its makers change?

| | layers | D | N | K | H | F |
|---|---|---|---|---|---|---|
| 7B | 32 | 4096 | 32 | 32 | 128 | 11008 |
| 70B | 80 | 8192 | 64 | 8 | 128 | 28672 |
""",
    hints=(
        "Count one block in units of D². What has attention, what has feed-forward?",
        "Attention has 2 (1 + K/N), as NH = D; feed-forward has 3 F/D. Put in both "
        "models' sizes.",
    ),
    choices={
        "a": Choice(
            "Nothing but the size: in a wider model attention weighs less.",
            "Attention and feed-forward both grow with D². Were the ratios K/N and F/D "
            "the same, the share of a block would be too.",
        ),
        "b": Choice(
            "Heads share keys and values; that is all of it.",
            "That alone would bring 31.9 % down to 21 %. Look at F/D as well: 2.69 and "
            "3.5.",
        ),
        "c": Choice(
            "It has more layers, and most of a layer is feed-forward.",
            "More layers bring more of both: within a block the shares stay. The "
            "ends take under 4 % of either model.",
        ),
        "d": Choice(
            "Heads share keys and values, and the feed-forward network is wider.",
            "Per block and in units of D²: 4 against 8.06 in the 7B model, 2.25 "
            "against 10.5 in the 70B one. Sharing brings 31.9 % down to 21 %, the "
            "width does the rest.",
        ),
    },
    right="d",
)


chapter.explain(
    "a_head_untied",
    title="a head that is not in the file",
    minutes=5,
    difficulty="easy",
    section="Loading, strictly",
    text="""
SmolLM2 has a tied head. You change `tied_head` to `False` in its config and load the
checkpoint. What does the loader of this chapter say, and what would a lenient one have
given you?
""",
    hints=(
        "How many tensors of shape (V, D) are in the file, and under which name?",
        "What is in a parameter that no file has filled?",
    ),
    choices={
        "a": Choice(
            "Nothing: the head is the embedding, and the loader finds it there.",
            "It would have to guess that. The model now asks for a tensor of its own, "
            "and no name in the file is that of the head.",
        ),
        "b": Choice(
            "“missing: lm_head.weight”. A lenient loader leaves the head at its random "
            "start, so that the scores are noise.",
            "The file holds the shared matrix once, under the embedding's name. All 30 "
            "blocks work perfectly, and the last product spoils everything.",
        ),
        "c": Choice(
            "That a shape is wrong. A lenient loader would have cut the matrix.",
            "The head has the embedding's shape, V by D. What is missing is the name.",
        ),
        "d": Choice(
            "“missing: lm_head.weight”. But a lenient loader does no harm: a head of "
            "its own can only help.",
            "One that has been trained might. This one has not been filled by "
            "anything: it is at its random start, and the scores are noise.",
        ),
    },
    right="b",
)
