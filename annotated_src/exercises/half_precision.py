"""Exercises on attention in float16: range, rounding, and what hides a score."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/04_half_precision", "Attention in half precision")


@chapter.implement(
    title="attention that float16 holds",
    minutes=12,
    difficulty="hard",
    section="The same attention in an odd order",
    text="""
Write ChatGLM's attention, without looking it up. Five things happen in some order:
divide by the root of the width and by `layer`; multiply queries and keys; hide with
-10000; multiply by `layer`; softmax. Which comes where, and in which dtype, so that no
overflow shows, a hidden key weighs nothing, and a row that sees nothing averages all
values?
""",
    hints=(
        "What overflows: the sum of products, the fill times the layer, or both? What "
        "could each of them be done after, or in?",
        "Divide the queries before the product. Fill first, then `.float()`, then "
        "times the layer. The weights go back to the dtype of the values.",
    ),
    proves="No score overflows that fits when divided by the layer, hidden keys weigh "
    "nothing, empty rows are a mean, and what comes back has the dtype that went in.",
    atol=1e-2,
    rtol=1e-2,
    why="Dividing first keeps the product in range. The fill comes before the layer's "
    "number, so the softmax sees -10000 times the layer, and only float32 holds that. "
    "A finite fill makes an empty row a mean and not NaN.",
)
def attend_in_half(queries, keys, values, mask, layer):
    """(B, N, T, H), (B, N, S, H), (B, N, S, V), mask (B, 1, T, S) -> (B, N, T, V)."""
    scores = queries / (math.sqrt(queries.shape[-1]) * layer) @ keys.mT
    scores = scores.masked_fill(~mask, -10000.0).float() * layer
    return scores.softmax(dim=-1).to(values.dtype) @ values


@attend_in_half.cases
def _(draw):
    def half(*rows):
        return torch.tensor([[rows]], dtype=torch.float16)

    def see(*rows):
        return torch.tensor([[rows]]).bool()

    one_nine = half([1, 0], [9, 4])
    # A hidden key next to a low score, then a row that sees nothing, and one that does.
    yield half([60]), half([-5], [1]), one_nine, see([1, 0]), 1
    keys = half([14, 0], [0, 14])
    yield half([-14, -14], [0, 2]), keys, one_nine, see([0, 0], [1, 1]), 7
    yield half([4] + [0] * 3), half([1] + [0] * 3, [0] * 4), one_nine, see([1, 1]), 3
    # Scores of 45000, a sum of 90000 divided by its root; of 90000; and of -12000.
    yield half([150] * 4), half([150] * 4, [75] * 4), one_nine, see([1, 1]), 1
    yield half([300]), half([300], [150]), one_nine, see([1, 1]), 28
    yield half([40] * 4), half([-150] * 4, [1] * 4), one_nine, see([1, 0]), 28
    for dtype, layer in ((torch.float16, 3), (torch.float32, 9)):
        queries = draw.normal(2, 3, 4, 8, dtype=dtype)
        keys, values = (draw.normal(2, 3, 6, width, dtype=dtype) for width in (8, 5))
        s, contexts = torch.arange(6), draw.integers(3, 6, 2)[:, None, None]
        mask = ((s < contexts) | (s <= s[2:, None])) & (s > 0)
        mask[1, 0] = False  # padding
        yield queries, keys, values, mask[:, None], layer


for fill in (10001.0, 9999.0):
    attend_in_half.equivalent(
        f"scores = scores.masked_fill(~mask, - {fill}).float() * layer",
        because="any number about as low hides as well",
    )
attend_in_half.equivalent(
    "return scores.softmax(dim=-1).to(keys.dtype) @ values",
    because="keys and values have one dtype",
)


@attend_in_half.also("float32 all the way")
def _(queries, keys, values, mask, layer):
    q, k, v = (x.float() for x in (queries, keys, values))
    scores = torch.einsum("bnth,bnsh->bnts", q, k) / q.shape[-1] ** 0.5
    scores = torch.where(mask, scores, torch.tensor(-10000.0 * layer))
    return (scores.softmax(-1) @ v).to(values.dtype)


@attend_in_half.also("float16 all the way, relaxed")
def _(queries, keys, values, mask, layer):
    scores = (queries / (queries.shape[-1] ** 0.5 * layer)) @ keys.transpose(-2, -1)
    scores = scores.masked_fill(mask.logical_not(), -10000.0)
    below = scores - scores.amax(dim=-1, keepdim=True)  # nothing is positive
    return (below * layer).softmax(dim=-1) @ values


@attend_in_half.also("loops")
def _(queries, keys, values, mask, layer):
    batch, heads, rows, width = queries.shape
    out = torch.zeros(batch, heads, rows, values.shape[-1], dtype=values.dtype)
    for b, n, t in torch.cartesian_prod(
        *map(torch.arange, (batch, heads, rows))
    ).tolist():
        query = queries[b, n, t].double() / (math.sqrt(width) * layer)
        scores = [
            float(query @ key.double()) if sees else -10000.0
            for key, sees in zip(keys[b, n], mask[b, 0, t], strict=True)
        ]
        powers = [math.exp(layer * (score - max(scores))) for score in scores]
        for power, value in zip(powers, values[b, n].double(), strict=True):
            out[b, n, t] += (power / sum(powers) * value).to(values.dtype)
    return out


def divided(queries, keys, layer):
    """Score as ChatGLM does, the queries divided first."""
    return queries / (math.sqrt(queries.shape[-1]) * layer) @ keys.mT


def filled(scores, mask, layer):
    """Hide and multiply back as ChatGLM does."""
    return scores.masked_fill(~mask, -10000.0).float() * layer


def cast_back(weights, values):
    """Average as ChatGLM does, in the dtype of the values."""
    return weights.to(values.dtype) @ values


def wrong_attention(score=divided, hide=filled, mix=cast_back):
    """Make an attention with one of its three parts changed."""

    def attend(queries, keys, values, mask, layer):
        scores = hide(score(queries, keys, layer), mask, layer)
        return mix(scores.softmax(dim=-1), values)

    return attend


attend_in_half.mistake(
    "product, then root",
    because="that is how the formula is written, and in float32 it makes no "
    "difference. In float16 the sum of products is the number that overflows",
    section="What overflows",
)(
    wrong_attention(
        lambda q, k, layer: (q @ k.mT) / (math.sqrt(q.shape[-1]) * layer),
    )
)
attend_in_half.mistake(
    "the layer's number left out",
    because="it is multiplied back, so it cancels. It does, for numbers that fit",
    section="What overflows",
)(
    wrong_attention(
        lambda q, k, layer: divided(q, k, 1),
        lambda scores, mask, layer: filled(scores, mask, 1),
    )
)
attend_in_half.mistake(
    "to float32 after the multiplication",
    because="all scores of an ordinary model fit either way. The fill does not: from "
    "layer 7 on it becomes minus infinity",
    section="A fill that is multiplied, too",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (
            scores.masked_fill(~mask, -10000.0) * layer
        ).float()
    )
)


@attend_in_half.mistake(
    "the values' width for the queries'",
    because="in most models queries, keys and values have one width, and any will do. "
    "A score is a sum over the width of a query",
    section="What overflows",
)
def _(queries, keys, values, mask, layer):
    scores = queries / (math.sqrt(values.shape[-1]) * layer) @ keys.mT
    return cast_back(filled(scores, mask, layer).softmax(dim=-1), values)


attend_in_half.mistake(
    "not multiplied back",
    because="a model runs without it, just with flatter weights, and layer 1 is right",
    section="Divide by the layer, multiply by the layer",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: scores.masked_fill(~mask, -10000.0).float()
    )
)
attend_in_half.mistake(
    "filled after the multiplication",
    because="filled last, the fill is what it says, -10000. That is too high for a row "
    "whose best score, multiplied back, is lower",
    section="A fill that is multiplied, too",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (scores.float() * layer).masked_fill(
            ~mask, -10000.0
        )
    )
)
attend_in_half.mistake(
    "minus infinity",
    because="it hides whatever the scores are. But a row that sees nothing has no "
    "maximum to subtract, and becomes NaN",
    section="Why not minus infinity",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (
            scores.masked_fill(~mask, -torch.inf).float() * layer
        )
    )
)
attend_in_half.mistake(
    "the lowest number added",
    because="-65504 is as low as float16 gets, and finite. A sum with a negative score "
    "is not",
    section="A fill that is multiplied, too",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (
            (scores + (~mask).to(scores.dtype) * torch.finfo(scores.dtype).min).float()
            * layer
        )
    )
)
attend_in_half.mistake(
    "a fill that is too high",
    because="exp(-20) is nearly nothing next to a score of 0, and so is exp(-100). "
    "Next to a score of -300 either is everything",
    section="A fill that is multiplied, too",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (
            scores.masked_fill(~mask, -20.0).float() * layer
        )
    )
)
attend_in_half.mistake(
    "empty rows to zero",
    because="fused kernels do that, and NaN is gone. ChatGLM's padding gets a mean",
    section="Why not minus infinity",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: (
            scores.masked_fill(~mask, -torch.inf).float() * layer
        ),
        mix=lambda weights, values: cast_back(weights.nan_to_num(0.0), values),
    )
)
attend_in_half.mistake(
    "the cast back left out",
    because="float32 is better than float16. But the layers to come are float16, and "
    "take nothing else",
    section="The ladder of equality",
)(wrong_attention(mix=lambda weights, values: weights @ values.float()))
attend_in_half.mistake(
    "the other polarity",
    because="the original fills where its mask is True. There True hides",
)(
    wrong_attention(
        hide=lambda scores, mask, layer: filled(scores, ~mask, layer),
    )
)


chapter.explain(
    "bfloat16_scores",
    title="the other half precision",
    minutes=5,
    difficulty="moderate",
    section="Where float16 ends, and how coarse it is",
    text="""
bfloat16 has eight bits for the exponent, as float32 has, and seven for $m$; float16 has
five and ten. Does attention in bfloat16 need the division by the layer's number, and
how wide are its steps near a score of 3000?
""",
    hints=(
        "Range comes from the exponent, steps from $m$.",
        "float16 has steps of 2 near 3000. What do three bits of $m$ fewer make of "
        "them?",
    ),
    choices={
        "a": Choice(
            "It needs it, and has steps of 2: both formats have 16 bits.",
            "Both have 16 bits, and spend them in other ways: three more on the "
            "exponent, three fewer on $m$. Range and steps change, in opposite "
            "directions.",
        ),
        "b": Choice(
            "It does not, and has finer steps: what has more range is more precise.",
            "It does not. But precision comes from $m$, which has three bits fewer: "
            "steps are eight times as wide.",
        ),
        "c": Choice(
            "It does not, and has steps of 16.",
            r"Its range is that of float32, up to about $3.4 \cdot 10^{38}$, so no "
            r"score overflows and the division has nothing to buy. Three bits of $m$ "
            r"fewer make steps eight times as wide: 16 near 3000, where float16 has 2.",
        ),
        "d": Choice(
            "It needs it the more: steps of 16 are the reason to divide.",
            "Steps of 16, yes. But dividing never makes a step finer: a floating point "
            "moves along with the number. It buys range alone, and bfloat16 has that.",
        ),
    },
    right="c",
)


@chapter.implement(
    title="half of the division each",
    minutes=8,
    difficulty="moderate",
    section="What overflows",
    text="""
Whisper divides the query *and* the key before the product, each by the root of the
factor. Write ChatGLM's divided scores in this way: in exact arithmetic they are what
`scores_by_layer` returns. With small queries and large keys float16 then keeps more
digits.
""",
    hints=(
        "What is the whole factor? Half of a division is a root, not a half.",
        r"The factor is $\sqrt d \cdot l$, with $d$ the width of a head. Each side is "
        r"divided by the root of all of it.",
    ),
    proves="The scores are divided by the root of the width and by the layer, and the "
    "division is shared: neither small queries nor small keys lose digits, and large "
    "ones do not overflow.",
    rtol=5e-3,
    why="A query of 0.0005, divided by 28 times the root of 128, is subnormal in "
    "float16, with few digits left. The root of that factor is 18 and not 317.",
)
def scores_split(queries, keys, layer):
    """(B, N, T, H), (B, N, S, H) -> scores (B, N, T, S), divided by the layer."""
    each = math.sqrt(math.sqrt(queries.shape[-1]) * layer)
    return (queries / each) @ (keys / each).mT


@scores_split.cases
def _(draw):
    keys = torch.tensor([[3.0, 3, 3, 3], [1, 0, 0, 0]])
    yield torch.full((1, 1, 1, 4), 6.0), keys[None, None], 8
    wide = torch.full((1, 1, 1, 128), 24.0).half()
    yield wide, wide / 2, 1
    yield wide, wide, 3  # their product is 73728, too much without the width's root
    yield wide, wide, 1
    yield 4 * wide, 4 * wide, 28  # and here even the width's root is not enough
    # Divided by all of the factor, nearly half way between two steps of float16.
    steps = torch.arange(20, 26) + 0.45
    small = (steps * 2.0**-24 * math.sqrt(128) * 28)[:, None].expand(1, 1, -1, 128)
    large = torch.linspace(700, 1000, 3)[:, None].expand(1, 1, -1, 128)
    yield small.half(), large.half(), 28
    yield large.half(), small.half(), 28
    # A factor of 64 that comes from the layer alone.
    small = ((torch.arange(38, 44) + 0.45) * 2.0**-24 * 64)[:, None][None, None]
    large = torch.linspace(40_000, 60_000, 3)[:, None][None, None]
    yield small.half(), large.half(), 64
    yield large.half(), small.half(), 64
    for shape, count, layer in (((2, 3, 4, 5), 7, 2), ((1, 2, 3, 16), 2, 28)):
        queries = draw.normal(*shape, dtype=torch.float64)
        keys = draw.normal(*shape[:2], count, shape[-1], dtype=torch.float64)
        yield queries, keys, layer


@scores_split.also("powers")
def _(queries, keys, layer):
    scale = queries.shape[-1] ** -0.25 * layer**-0.5
    return torch.einsum("bnth,bnsh->bnts", queries * scale, keys * scale)


@scores_split.also("the same root of three factors")
def _(queries, keys, layer):
    fourth = queries.size(-1) ** (1 / 4)
    root = math.sqrt(layer)
    return torch.matmul(queries / fourth / root, (keys / fourth / root).transpose(2, 3))


def wrong_split(query_part, key_part, also=lambda scores, width, layer: scores):
    """Make scores whose queries and keys are divided by something else."""

    def scores(queries, keys, layer):
        width = queries.shape[-1]
        parts = queries / query_part(width, layer), keys / key_part(width, layer)
        return also(parts[0] @ parts[1].mT, width, layer)

    return scores


def whole(width, layer):
    """Give the whole factor that a score is divided by."""
    return math.sqrt(width) * layer


def nothing(width, layer):
    """Divide by one."""
    return 1.0


scores_split.mistake(
    "the whole factor on both sides",
    because="each side is divided, so each by the factor. Then the product is divided "
    "by its square",
)(wrong_split(whole, whole))
scores_split.mistake(
    "half of the factor on both sides",
    because="sharing a division sounds like halving it. What is shared in a product is "
    "the root",
)(wrong_split(lambda d, n: whole(d, n) / 2, lambda d, n: whole(d, n) / 2))
scores_split.mistake(
    "queries alone",
    because="ChatGLM does it, and in exact arithmetic nothing changes. Small queries "
    "become subnormal",
    section="Divide by the layer, multiply by the layer",
)(wrong_split(whole, nothing))
scores_split.mistake(
    "keys alone",
    because="it is the keys that are large. When they are small, they become subnormal",
    section="Divide by the layer, multiply by the layer",
)(wrong_split(nothing, whole))
scores_split.mistake(
    "the product divided",
    because="it is one division for two. But the product is what overflows",
)(wrong_split(nothing, nothing, lambda scores, d, n: scores / whole(d, n)))
scores_split.mistake(
    "no root of the layer",
    because="the fourth root of the width, as in Whisper, which knows no layers; the "
    "layer's number is put to it as it is",
)(wrong_split(lambda d, n: d**0.25 * n, lambda d, n: d**0.25 * n))
scores_split.mistake(
    "the root of the width, twice",
    because="a score is divided by the root of the width. Each of two sides takes the "
    "fourth root",
)(wrong_split(lambda d, n: math.sqrt(d * n), lambda d, n: math.sqrt(d * n)))
scores_split.mistake(
    "the layer after the product",
    because="Whisper shares the root of the width, so that is what is shared. What "
    "comes after the product comes too late, if that overflows",
)(
    wrong_split(
        lambda d, n: d**0.25, lambda d, n: d**0.25, lambda scores, d, n: scores / n
    )
)
scores_split.mistake(
    "the root of the width after the product",
    because="the layer's number is what this chapter divides by early; the root of the "
    "width stands behind the product in the formula",
)(
    wrong_split(
        lambda d, n: n**0.5,
        lambda d, n: n**0.5,
        lambda scores, d, n: scores / math.sqrt(d),
    )
)
scores_split.mistake(
    "the width on one side, the layer on the other",
    because="the factor is a product of two, and there are two sides. The parts are "
    "not alike: the side that gets the larger one loses digits",
    section="Divide by the layer, multiply by the layer",
)(wrong_split(lambda d, n: math.sqrt(d), lambda d, n: n))
scores_split.mistake(
    "layers counted from 0",
    because="the original's `layer_id` does, and adds one. `layer` here counts from 1",
    section="The ladder of equality",
)(
    wrong_split(
        lambda d, n: math.sqrt(whole(d, n + 1)), lambda d, n: math.sqrt(whole(d, n + 1))
    )
)


@chapter.debug(
    title="as low as it gets",
    minutes=8,
    difficulty="moderate",
    section="A fill that is multiplied, too",
    text="""
A colleague hides by *adding* the lowest number of float16, -65504, "as low as it gets,
and finite". Rows that see nothing should weigh all keys alike. Some become NaN, and not
in every batch. Mend it.
""",
    hints=(
        "What is -65504 - 17 in float16? And -65504 - 15?",
        "Steps are 32 down there. A sum depends on the score that it was meant to "
        "hide; something else that masks do does not.",
    ),
    proves="Hidden scores weigh nothing, whatever they are and however low the "
    "others; a row that sees nothing weighs all alike.",
    atol=2e-3,
    why="If all hidden scores of an empty row are -16 or less, every sum is minus "
    "infinity, and the softmax of that is NaN. *Filling in* ignores them. A sum with a "
    "huge number also has no room for the score that it was meant to hide.",
)
def hidden_weights(scores, mask):
    """Float16 scores, mask True: visible, both (B, N, T, S) -> weights, float16."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest)
    return scores.float().softmax(dim=-1).to(scores.dtype)


@hidden_weights.broken(
    "the lowest number added",
    because="masks to add are everywhere, and -65504 is finite. Its sum with -16 is "
    "not",
)
def _(scores, mask):
    lowest = torch.finfo(scores.dtype).min
    scores = scores + lowest * (~mask).to(scores.dtype)
    return scores.float().softmax(dim=-1).to(scores.dtype)


def wrong_hiding(hide, after=lambda weights, mask: weights, dim=-1):
    """Make weights whose hidden scores are treated in another way."""

    def weights(scores, mask):
        weights = hide(scores, ~mask).float().softmax(dim=dim)
        return after(weights, mask).to(scores.dtype)

    return weights


def fill_lowest(scores, hidden):
    """Fill with the lowest number of the scores' dtype."""
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def fill_infinite(scores, hidden):
    """Fill with minus infinity."""
    return scores.masked_fill(hidden, -torch.inf)


hidden_weights.mistake(
    "minus infinity filled in",
    because="it hides whatever the scores are. But a row of nothing else has no "
    "maximum to subtract",
    section="Why not minus infinity",
)(wrong_hiding(fill_infinite))
hidden_weights.mistake(
    "empty rows to zero",
    because="NaN looks like a hole to be filled with zeros; these rows should weigh "
    "all keys alike",
    section="Why not minus infinity",
)(wrong_hiding(fill_infinite, lambda weights, mask: weights.nan_to_num(0.0)))
hidden_weights.mistake(
    "NaN made even",
    because="NaN is what one sees. Where one sum of an empty row is not minus infinity "
    "there is none, and that key gets all the weight",
)(
    lambda scores, mask: (
        (scores + torch.finfo(scores.dtype).min * (~mask).to(scores.dtype))
        .float()
        .softmax(dim=-1)
        .nan_to_num(1 / scores.shape[-1])
        .to(scores.dtype)
    )
)
hidden_weights.mistake(
    "added in float32",
    because="in float32 the sum is finite, and NaN is gone. But the hidden scores are "
    "still in it, and an empty row is weighed by them",
)(
    wrong_hiding(
        lambda scores, hidden: (
            scores.float() + torch.finfo(scores.dtype).min * hidden.float()
        )
    )
)
hidden_weights.mistake(
    "the mask after the softmax",
    because="a weight of 0 hides as well. But the others then no longer add up to 1",
)(wrong_hiding(lambda scores, hidden: scores, lambda weights, mask: weights * mask))
hidden_weights.mistake(
    "a smaller number added",
    because="-100 is far from where float16 ends. A hidden score of 200 is not hidden "
    "by it, and an empty row is not even",
)(wrong_hiding(lambda scores, hidden: scores - 100.0 * hidden.to(scores.dtype)))
hidden_weights.mistake(
    "hidden scores set to 0",
    because="a score times a mask of 0 and 1 looks hidden. But 0 is a score like "
    "others, and e to the 0 is 1",
)(wrong_hiding(lambda scores, hidden: scores.masked_fill(hidden, 0.0)))
hidden_weights.mistake(
    "a fill that is too high",
    because="exp(-20) is nearly nothing next to a score of 0, and so is exp(-100). "
    "Next to a score of -300 either is everything",
)(wrong_hiding(lambda scores, hidden: scores.masked_fill(hidden, -20.0)))
hidden_weights.mistake(
    "softmax over the rows",
    because="the scores have two token axes, and one of them is asked for by number",
    section="The same attention in an odd order",
)(wrong_hiding(fill_lowest, dim=-2))


@hidden_weights.cases
def _(draw):
    def half(*rows):
        return torch.tensor([[rows]], dtype=torch.float16)

    def see(*rows):
        return torch.tensor([[rows]]).bool()

    yield half([-17, -40], [1, 2]), see([0, 0], [1, 1])
    yield half([-17, 3, 40], [-25, -26, 4]), see([0, 0, 0], [1, 1, 0])
    yield half([1, 300, 2], [-200, 0, 5]), see([1, 0, 1], [0, 0, 0])
    yield half([-300, 1, -301], [1, 2, 3]), see([1, 0, 1], [1, 1, 1])
    scores = draw.normal(2, 3, 4, 5)
    mask = draw.uniform(2, 3, 4, 5) < 0.6
    mask[:, :, 1:, 2] = True
    mask[1, :, 0] = False
    yield (30 * scores).half(), mask


@hidden_weights.also("torch.where")
def _(scores, mask):
    filled = torch.where(mask, scores, torch.tensor(-10000.0, dtype=scores.dtype))
    return torch.softmax(filled, dim=-1, dtype=torch.float32).half()


@hidden_weights.also("loops")
def _(scores, mask):
    rows = []
    for row, visible in zip(scores.flatten(0, 2), mask.flatten(0, 2), strict=True):
        sees = visible.tolist() if visible.any() else [True] * len(visible)
        kept = row.tolist() if visible.any() else [0.0] * len(visible)
        top = max(s for s, ok in zip(kept, sees, strict=True) if ok)
        powers = [
            math.exp(s - top) if ok else 0 for s, ok in zip(kept, sees, strict=True)
        ]
        rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows).half().view(scores.shape)


chapter.explain(
    "fused_empty_rows",
    title="zeros for a mean",
    minutes=6,
    difficulty="moderate",
    section="Why not minus infinity",
    text="""
A batch has rows padded on the left, and padding sees nothing. Replace ChatGLM's
attention by torch's fused kernel: where nothing is visible, it gives zeros and not the
mean of all values. Which logits change?
""",
    hints=(
        "Whose attention changes? And who reads what these tokens become?",
        "A hidden key has weight 0, and 0 times a finite number is 0.",
    ),
    choices={
        "a": Choice(
            "Those of padding, and no others.",
            "Padding's own vectors change, in every layer. Nobody sees padding: the "
            "weight is exactly 0, and 0 times something finite is 0. One finite "
            "nonsense is as good there as another.",
        ),
        "b": Choice(
            "None: what is hidden makes no difference.",
            "Padding is hidden from *others*. Its own rows have logits as well, and "
            "zeros are not the mean. It is only that nobody asks for them.",
        ),
        "c": Choice(
            "Those of every token in a padded row.",
            r"That is what NaN does: $0 \cdot \text{NaN}$ is NaN, and spreads in one "
            "layer. Zeros are finite, and a weight of 0 makes a true zero of them.",
        ),
        "d": Choice(
            "All of the batch, by way of the norms.",
            "A LayerNorm looks at one token's features. Tokens meet in attention "
            "alone, and rows of a batch never do.",
        ),
    },
    right="a",
)
