"""Exercises on the decisions that tell one decoder from another."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("device/01_authoring", "Authoring: one trunk, four models")


@chapter.implement(
    title="Gemma's norm",
    minutes=10,
    difficulty="moderate",
    section="Gemma: a scale and a gain",
    text="""
Write Gemma's norm, without looking it up. It differs from Llama's in two places: in the
gain, and in the moment of the cast. All is computed in float32, the gain too; what
comes back has the dtype that came in.
""",
    hints=(
        "A weight of zeros leaves the unit vector alone.",
        "Widen both `x` and `weight` first, and go back to half precision in the very "
        "last step, after the gain.",
    ),
    rtol=2e-4,
    proves="The gain is 1 + weight, eps stands inside the root, and only the finished "
    "product is rounded to half precision.",
    why="Llama's norm casts first and multiplies then; Gemma's was trained the other "
    "way round. In float32 nobody sees the difference, so the inputs hold some in "
    "float16.",
)
def gemma_norm(x, weight, eps):
    """(..., D), (D,) as the file has it, a number -> (..., D), in the dtype of x."""
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    unit = wide * torch.rsqrt(mean_square + eps)
    return (unit * (1 + weight.float())).type_as(x)


@gemma_norm.cases
def _(draw):
    weight = torch.tensor([0.5, -1.0])
    yield torch.tensor([[3.0, 4.0]]), weight, 1e-6
    yield torch.tensor([[0.1, 0.7]]), weight, 0.1
    yield draw.normal(2, 3, 4) + 0.5, draw.uniform(4, low=-0.5, high=0.5), 1e-6
    # The root mean squares are 5, 1500 and 10. No product lies near a tie of float16.
    weight = torch.tensor([0.0005, -0.546875]).half()
    yield torch.tensor([[1.0, 7.0]]).half(), weight, 1e-6
    yield torch.tensor([[300.0, 2100.0], [-14.0, 2.0]]).half(), weight, 1e-6


@gemma_norm.also("plain loops")
def _(x, weight, eps):
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        size = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        rows.append(
            [v / size * (1 + w) for v, w in zip(row, weight.tolist(), strict=True)]
        )
    return torch.tensor(rows).view(x.shape).to(x.dtype)


@gemma_norm.also("torch.nn.functional")
def _(x, weight, eps):
    gain = torch.ones_like(weight, dtype=torch.float32) + weight
    normed = torch.nn.functional.rms_norm(x.float(), weight.shape, gain, eps)
    return normed.to(x.dtype)


@gemma_norm.also("the package")
def _(x, weight, eps):
    from annotated_src.norms import GemmaRMSNorm

    norm = GemmaRMSNorm(len(weight), eps).requires_grad_(False)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


def wrong_norm(
    size=lambda x, eps: (x.square().mean(dim=-1, keepdim=True) + eps).sqrt(),
    gain=lambda weight: 1 + weight.float(),
    centre=False,
):
    """Make a gemma_norm with another size, another gain, or a mean taken off."""

    def norm(x, weight, eps):
        wide = x.float()
        if centre:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide / size(wide, eps) * gain(weight)).type_as(x)

    return norm


gemma_norm.mistake(
    "Llama's gain",
    because="a gain multiplies; Gemma stores what is to be *added* to 1, so that decay "
    "pulls towards leaving the vector alone",
)(wrong_norm(gain=lambda weight: weight.float()))


@gemma_norm.mistake(
    "the cast before the gain",
    because="Llama does it so, and in float32 it is the same",
    section="The ladder of equality",
)
def _(x, weight, eps):
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return unit.type_as(x) * (1 + weight)


gemma_norm.mistake(
    "1 added in half precision",
    because="the weight came so; but next to 1 float16 has steps of 0.001, and what is "
    "stored is small",
    section="The ladder of equality",
)(wrong_norm(gain=lambda weight: (1 + weight).float()))
gemma_norm.mistake(
    "eps outside the root",
    because="it guards a division, so it seems to belong to the divisor; the root of "
    "0.1 is three times as much",
)(wrong_norm(size=lambda x, eps: x.square().mean(dim=-1, keepdim=True).sqrt() + eps))
gemma_norm.mistake(
    "the length for the root mean square",
    because="unit vectors have length 1 in geometry; here they have a root mean square "
    "of 1, and so a length of the root of D",
)(wrong_norm(size=lambda x, eps: (x.square().sum(-1, keepdim=True) + eps).sqrt()))
gemma_norm.mistake(
    "the mean taken off",
    because="LayerNorm does; a norm by root mean square leaves the mean in",
)(wrong_norm(centre=True))


@gemma_norm.mistake(
    "squares in half precision",
    because="the mean is small again, so nothing seems to need the room; but float16 "
    "ends at 65,504, and the square of 300 lies beyond",
    section="The ladder of equality",
)
def _(x, weight, eps):
    mean_square = x.square().mean(dim=-1, keepdim=True).float()
    unit = x.float() * torch.rsqrt(mean_square + eps)
    return (unit * (1 + weight.float())).type_as(x)


@gemma_norm.mistake(
    "float32 comes back",
    because="all was computed in it; a half model then carries on in float32, or stops "
    "at the next matrix",
    section="The ladder of equality",
)
def _(x, weight, eps):
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return unit * (1 + weight.float())


@chapter.implement(
    title="the embedding's factor",
    minutes=5,
    difficulty="easy",
    section="Gemma: a scale and a gain",
    text=r"""
Look tokens up as Gemma does: rows of the table, times $\sqrt D$. The factor is rounded
to the table's dtype first, as the original does it. The table itself must stay as it
is, since it is the head as well.
""",
    hints=(
        "What is the width of a row, and what its root?",
        "A Python number keeps all its digits in a product with a bfloat16 tensor. A "
        "tensor of that dtype does not.",
    ),
    proves="The rows come times the root of their width, the factor rounded to the "
    "table's dtype, and the table is not changed.",
    rtol=1e-6,
    atol=1e-6,
    why="In bfloat16 the root of 12 is 3.469 and not 3.464. The factor then multiplies "
    "every number in the stream, so the original's rounding is part of the model.",
)
def scaled_embedding(tokens, table):
    """Ids (B, T), a table (V, D) -> vectors (B, T, D), in the table's dtype."""
    factor = torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype)
    return table[tokens] * factor


@scaled_embedding.cases
def _(draw):
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 0.0]])
    yield torch.tensor([[1, 0]]), table
    yield draw.integers(0, 7, 2, 3), draw.normal(7, 5)
    yield draw.integers(0, 9, 2, 5), draw.normal(9, 12, dtype=torch.bfloat16)


@scaled_embedding.also("row by row")
def _(tokens, table):
    root = torch.tensor(math.sqrt(len(table[0]))).to(table.dtype)
    return torch.stack([torch.stack([table[i] * root for i in row]) for row in tokens])


@scaled_embedding.also("torch.nn.functional")
def _(tokens, table):
    looked_up = torch.nn.functional.embedding(tokens, table)
    return looked_up * table.new_tensor(table.shape[-1]).sqrt()


@scaled_embedding.mistake(
    "no factor",
    because="no other model here has one, and the next norm divides it out again; but "
    "the block adds to what is *not* normed",
)
def _(tokens, table):
    return table[tokens]


@scaled_embedding.mistake(
    "divided by the root",
    because="attention divides by a root of a width; here rows are small, and must "
    "grow",
)
def _(tokens, table):
    factor = torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype)
    return table[tokens] / factor


@scaled_embedding.mistake(
    "times the width",
    because="variances are multiplied by the width; numbers by its root",
)
def _(tokens, table):
    return table[tokens] * table.shape[1]


@scaled_embedding.mistake(
    "the root of the vocabulary",
    because="a table has two sizes, and `shape[0]` comes to mind first",
)
def _(tokens, table):
    return table[tokens] * torch.tensor(table.shape[0] ** 0.5, dtype=table.dtype)


@scaled_embedding.mistake(
    "a factor with all its digits",
    because="a Python number is more exact, and exact sounds right; the weights were "
    "trained with the rounded one",
    section="The ladder of equality",
)
def _(tokens, table):
    return table[tokens] * table.shape[1] ** 0.5


@scaled_embedding.mistake(
    "the table scaled in place",
    because="scaling once saves work at every call; but the head is the same table, "
    "and its logits would grow as well",
)
def _(tokens, table):
    table *= torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype)
    return table[tokens]


@chapter.implement(
    title="how many parameters?",
    minutes=15,
    difficulty="moderate",
    section="What it will weigh",
    text="""
Count the parameters of a Gemma from its sizes, to the last one. Each feed-forward
network is gated, nothing has a bias, and the head is the embedding.
""",
    hints=(
        "Write down the shapes of one block's tensors. How many matrices has a gated "
        "network, how many norms a block?",
        "Heads need not add up to the width: `q_proj` is N * H rows of D. Keys and "
        "values have K heads. One more norm stands before the head.",
    ),
    proves="The count is right for grouped heads, for heads that do not add up to the "
    "width, and for the published Gemma 2B and 7B.",
)
def count_gemma(
    vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, ffn_dim
):
    """Seven sizes -> the number of parameters, an int."""
    attention = (2 * num_heads + 2 * num_kv_heads) * head_dim * embed_dim
    block = attention + 3 * embed_dim * ffn_dim + 2 * embed_dim
    return vocab_size * embed_dim + num_layers * block + embed_dim


@count_gemma.cases
def _(draw):
    yield 3, 1, 4, 2, 1, 2, 5
    yield 11, 3, 10, 6, 2, 4, 7
    yield 256_000, 18, 2048, 8, 1, 256, 16_384
    yield 256_000, 28, 3072, 16, 16, 256, 24_576


@count_gemma.also("shape by shape, without the numbers")
def _(vocab_size, num_layers, width, heads, kv_heads, head_dim, ffn_dim):
    wide, few = heads * head_dim, kv_heads * head_dim
    shapes = [(vocab_size, width), (width,)]
    for _ in range(num_layers):
        shapes += [(width,), (wide, width), (few, width), (few, width), (width, wide)]
        shapes += [(width,), (ffn_dim, width), (ffn_dim, width), (width, ffn_dim)]
    return sum(torch.empty(shape, device="meta").numel() for shape in shapes)


@count_gemma.also("all of it times the width")
def _(vocab_size, num_layers, width, heads, kv_heads, head_dim, ffn_dim):
    rows = 2 * head_dim * (heads + kv_heads) + 3 * ffn_dim + 2
    return width * (vocab_size + num_layers * rows + 1)


def wrong_count(
    attention=lambda width, heads, kv_heads, head_dim: (
        2 * width * (heads + kv_heads) * head_dim
    ),
    matrices=3,
    norms=2,
    last=1,
    tables=1,
):
    """Make a count_gemma with other matrices, norms or tables."""

    def count(vocab_size, num_layers, width, heads, kv_heads, head_dim, ffn_dim):
        block = attention(width, heads, kv_heads, head_dim)
        block += matrices * width * ffn_dim + norms * width
        return tables * vocab_size * width + num_layers * block + last * width

    return count


count_gemma.mistake(
    "a head of its own",
    because="every model has an `lm_head` in its forward pass; in Gemma it is the "
    "embedding, and stored once",
)(wrong_count(tables=2))
count_gemma.mistake(
    "a key head for every query head",
    because="that is so in Gemma 7B; Gemma 2B has a single one",
)(wrong_count(attention=lambda width, heads, kv_heads, size: 4 * width * heads * size))
count_gemma.mistake(
    "heads that add up to the width",
    because="in most models they do; in Gemma 7B sixteen heads of 256 are 4096, and "
    "the width is 3072",
    section="The diffs",
)(
    wrong_count(
        attention=lambda width, heads, kv_heads, size: (
            2 * width * (width + kv_heads * size)
        )
    )
)
count_gemma.mistake(
    "a network without its gate",
    because="a feed-forward network has one matrix up and one down; a gated one has "
    "another of the size of up",
)(wrong_count(matrices=2))
count_gemma.mistake(
    "no norms",
    because="they are few; but a loader that is strict counts them, too",
)(wrong_count(norms=0, last=0))
count_gemma.mistake(
    "the last norm forgotten",
    because="two in each block are seen at once; one more stands before the head",
)(wrong_count(last=0))


chapter.explain(
    "forgotten_factor",
    title="right to four digits",
    minutes=5,
    difficulty="moderate",
    section="Gemma: a scale and a gain",
    text=r"""
Someone forgets the factor $\sqrt D$, and finds that the first block's attention weights
are still right to four digits. What leaves that block is wrong all the same. Why?
""",
    hints=(
        "What does attention read: the stream, or the stream behind a norm?",
        "A block has two ways from its input to its output. Which of them does not go "
        "through a norm?",
    ),
    choices={
        "a": Choice(
            "Chance: random weights give nearly even attention, with or without it.",
            "The weights here are large enough to be far from even, and with others it "
            "is the same. Four digits at every place are no chance.",
        ),
        "b": Choice(
            "A softmax does not notice a common factor.",
            "It does not notice a common *summand*. Scores times two make it sharper.",
        ),
        "c": Choice(
            "A norm divides any factor out; but the block adds its output to the "
            "stream.",
            r"Attention reads $\operatorname{norm}(x)$, the same up to $\varepsilon$. "
            r"Beside what it adds, $x$ itself is $\sqrt D$ times too small: the "
            "token's own vector is drowned out, and the second norm reads another "
            "direction.",
        ),
        "d": Choice(
            "The scores are divided by √H, which makes up for it.",
            "That division is the same in both models, and cannot make up for "
            "anything.",
        ),
    },
    right="c",
)


chapter.explain(
    "four_gigabytes",
    title="four gigabytes",
    minutes=5,
    difficulty="easy",
    section="What it will weigh",
    text="""
A phone lends you 4 GB. Which of the five models in the figure fit, with weights at half
a byte and a cache of 8192 tokens at two bytes a number?
""",
    hints=(
        "Weights: the bars above, in billions, times half a byte.",
        "The bars below are kilobytes of cache a token, at two bytes a number. "
        "Multiply by 8192, and compare Gemma 2B with Phi-2.",
    ),
    choices={
        "a": Choice(
            "TinyLlama alone.",
            "Gemma 2B fits, too: 1.3 GB of weights, and with a single key/value head "
            "only 0.2 GB of cache.",
        ),
        "b": Choice(
            "TinyLlama and Gemma 2B.",
            "0.6 and 1.3 GB of weights, and with their few key/value heads 0.2 GB of "
            "cache each. Phi-2 and ChatGLM-6B have weights that fit, but their caches, "
            "of 2.7 and 3.8 GB, come on top. The weights of Gemma 7B alone are too "
            "much.",
        ),
        "c": Choice(
            "TinyLlama, Gemma 2B and Phi-2.",
            "Phi-2 weighs about as much as Gemma 2B, 1.4 GB. But it has 32 key/value "
            "heads where Gemma 2B has one: its cache takes 2.7 GB, and both together "
            "just miss.",
        ),
        "d": Choice(
            "All but Gemma 7B.",
            "By their weights, yes. With 8192 tokens the caches of Phi-2 and "
            "ChatGLM-6B are larger than their weights, and the two together do not "
            "fit.",
        ),
    },
    right="b",
    why="Half a byte is the ideal: the chapter on making models small counts what "
    "comes on top.",
)


@chapter.debug(
    title="heads that turn in part",
    minutes=10,
    difficulty="moderate",
    section="Phi-2: side by side, and heads that turn in part",
    text="""
Phi turns only the first `rotary_dim` features of a head, in half-split pairs. This
function passes a test with a single token. With a text it is wrong. Mend it. Why could
the test not see it?
""",
    hints=(
        "At which position does a single token stand, and what turns there?",
        "The pairs that turn share the whole range of frequencies among them, as if "
        "the head were no wider than they are.",
    ),
    proves="The first features turn as a head of that size would, at any positions, "
    "row by row of the batch, and the others pass.",
    atol=1e-4,
    why="The exponents are divided by `rotary_dim`, not by the width of the head. The "
    "first pair turns by 1 in both, and at position 0 nothing turns at all, which is "
    "what the test looked at. Test with positions far from 0.",
)
def turn_part(x, positions, rotary_dim, base):
    """(B, N, T, H), (B, T), two numbers -> x with its first features turned."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, rotary_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :rotary_dim].chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


@turn_part.broken(
    "the frequencies of the whole head, cut off",
    because="the head has a table of frequencies, and of the features that turn it "
    "needs the first ones",
)
def _(x, positions, rotary_dim, base):
    frequencies = base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    frequencies = frequencies[: rotary_dim // 2]
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, rotary_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :rotary_dim].chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


@turn_part.cases
def _(draw):
    x = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 6.0]).view(1, 1, 1, 6)
    yield x, torch.tensor([[0]]), 4, 100.0
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 6.0]).view(1, 1, 1, 6)
    yield x, torch.tensor([[3]]), 4, 100.0
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    yield x, torch.tensor([[1]]), 4, 16.0
    positions = torch.tensor([[0, 0, 1], [7, 8, 30]])
    yield draw.normal(2, 3, 3, 20), positions, 8, 1e4
    yield draw.normal(2, 2, 4, 8), draw.integers(0, 40, 2, 4), 6, 500.0


@turn_part.also("pair by pair")
def _(x, positions, rotary_dim, base):
    out, half = x.clone(), rotary_dim // 2
    for row, places in enumerate(positions.tolist()):
        for t, place in enumerate(places):
            for i in range(half):
                angle = place * base ** (-i / half)
                a, b = x[row, :, t, i], x[row, :, t, i + half]
                out[row, :, t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[row, :, t, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


@turn_part.also("complex numbers")
def _(x, positions, rotary_dim, base):
    half = rotary_dim // 2
    angles = positions[:, None, :, None] / base ** (torch.arange(half) / half)
    pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), dim=-1)


def turned(x, angles):
    """Turn all features in half-split pairs: (..., 2 R) by (..., R)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def angles_of(positions, rotary_dim, base):
    """Multiply positions and frequencies: (B, T) -> (B, 1, T, rotary_dim / 2)."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return positions[:, None, :, None] * frequencies


@turn_part.mistake(
    "the whole head turns",
    because="in Llama it does; in Phi-2 48 of 80 features do not",
)
def _(x, positions, rotary_dim, base):
    return turned(x, angles_of(positions, x.shape[-1], base))


@turn_part.mistake(
    "the last features turn",
    because="which part is a decision that no size tells; Phi turns the first",
)
def _(x, positions, rotary_dim, base):
    passing, turning = x[..., :-rotary_dim], x[..., -rotary_dim:]
    turning = turned(turning, angles_of(positions, rotary_dim, base))
    return torch.cat((passing, turning), dim=-1)


@turn_part.mistake(
    "pairs across the whole head",
    because="half-split sounds like half of the head; it is half of what turns",
)
def _(x, positions, rotary_dim, base):
    angles = angles_of(positions, rotary_dim, base)
    idle = angles.new_zeros(*angles.shape[:-1], (x.shape[-1] - rotary_dim) // 2)
    return turned(x, torch.cat((angles, idle), dim=-1))


@turn_part.mistake(
    "neighbours for pairs",
    because="the paper pairs neighbours, and so do Meta's files; these weights want "
    "half-split pairs",
    section="One loop, three recipes",
)
def _(x, positions, rotary_dim, base):
    angles = angles_of(positions, rotary_dim, base)
    a, b = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((pairs, x[..., rotary_dim:]), dim=-1)


@turn_part.mistake(
    "turned the other way",
    because="the sign in `(-b, a)` is easily put on the other half; then distances "
    "count backwards",
    section="One loop, three recipes",
)
def _(x, positions, rotary_dim, base):
    turning = turned(x[..., :rotary_dim], -angles_of(positions, rotary_dim, base))
    return torch.cat((turning, x[..., rotary_dim:]), dim=-1)


@turn_part.mistake(
    "positions from arange",
    because="a text without padding or cache stands at 0, 1, 2; the next call of the "
    "same text does not",
)
def _(x, positions, rotary_dim, base):
    counted = torch.arange(x.shape[2])[None]
    turning = turned(x[..., :rotary_dim], angles_of(counted, rotary_dim, base))
    return torch.cat((turning, x[..., rotary_dim:]), dim=-1)


@turn_part.mistake(
    "the first row's positions for the batch",
    because="one table for all rows is enough, as long as nothing is padded",
)
def _(x, positions, rotary_dim, base):
    angles = angles_of(positions[:1], rotary_dim, base)
    turning = turned(x[..., :rotary_dim], angles)
    return torch.cat((turning, x[..., rotary_dim:]), dim=-1)


@turn_part.mistake(
    "a base of 10,000, whatever is asked for",
    because="every paper has this number; long texts have made it larger",
)
def _(x, positions, rotary_dim, base):
    turning = turned(x[..., :rotary_dim], angles_of(positions, rotary_dim, 1e4))
    return torch.cat((turning, x[..., rotary_dim:]), dim=-1)


@turn_part.mistake(
    "what does not turn is dropped",
    because="the function is about what turns; the score needs all features of the "
    "head",
)
def _(x, positions, rotary_dim, base):
    return turned(x[..., :rotary_dim], angles_of(positions, rotary_dim, base))
