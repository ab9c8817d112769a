"""Exercises on integers for weights: rows, groups, bytes, and integer products."""

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("device/03_quantizing", "Quantising: fewer bits a weight")


def off_the_edge(draw, rows, cols, end):
    """Draw rows that round the same in every arithmetic: nothing is near a tie.

    Each row has a scale of its own, and its largest magnitude is `end` scales.
    """
    levels = draw.integers(-100, 101, rows, cols)
    steps = levels + draw.uniform(rows, cols, low=-0.3, high=0.3)
    steps[torch.arange(rows), draw.integers(0, cols, rows)] = end
    return steps * draw.uniform(rows, 1, low=0.01, high=0.1)


@chapter.implement(
    title="a matrix in bytes",
    minutes=10,
    difficulty="moderate",
    section="Eight weights by hand",
    text=r"""
Round a matrix to int8, without looking it up: a scale for each *row*, each weight to
the *nearest* level. Do it as ChatGLM and the converters do, so that the largest
magnitude of a row becomes 127 or $-127$. A row of zeros gets the scale 1. Scales are
float32, whatever the weights are.
""",
    hints=(
        "Three steps: the largest magnitude of each row, the scale, the integers. What "
        "is 127 times the scale?",
        "`keepdim=True` keeps the axis that the division needs. What is 0 / 0, and "
        "what does a cast to int8 make of it? What does a cast make of 2.9?",
    ),
    proves="Each row uses its own 255 levels, largest magnitude first, to the nearest; "
    "rows of zeros and weights in half are no exception.",
    rtol=1e-5,
    atol=1e-7,
    why="The largest magnitude needs no clamp here: it is 127 scales, by definition. "
    "The chapter's own functions divide by 127.5, and then it does.",
)
def round_rows(weight):
    """(R, C) -> int8 integers (R, C) and float32 scales (R, 1)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().to(torch.int8), scale


@round_rows.cases
def _(draw):
    yield (torch.tensor([[0.507, -1.27, 0.036], [0.1, 12.7, -5.08]]),)
    squared = off_the_edge(draw, 3, 3, -127.0)
    squared[1] = 0
    yield (squared,)
    yield (off_the_edge(draw, 5, 8, 127.0),)
    yield (off_the_edge(draw, 4, 16, -127.0).half(),)


@round_rows.also("plain Python, row by row")
def _(weight):
    integers, scales = [], []
    for row in weight.tolist():
        scale = max(abs(w) for w in row) / 127 or 1.0
        integers.append([round(w / scale) for w in row])
        scales.append([scale])
    return torch.tensor(integers, dtype=torch.int8), torch.tensor(scales)


@round_rows.also("times 127, clamped to be safe")
def _(weight):
    weight = weight.float()
    low, high = weight.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(-low, high)
    largest[largest == 0] = 127
    integers = torch.floor(weight * (127 / largest) + 0.5).clamp(-127, 127)
    return integers.to(torch.int8), largest / 127


@round_rows.mistake(
    "one scale for the matrix",
    because="with one number to store it is simpler, and nothing fails. Rows with "
    "small weights lose their levels to the row that has the largest",
    section="The annotated source",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().max().expand(len(weight), 1) / 127
    return (weight / scale).round().to(torch.int8), scale


@round_rows.mistake(
    "a scale for each column",
    because="`dim=0` sounds like the rows. It is the axis that goes away: what is left "
    "is one number for each column, and it cannot wait until a sum is there",
    section="Integers times integers",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=0, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().to(torch.int8), scale


@round_rows.mistake(
    "the axis dropped",
    because="(R, C) divided by (R,) looks right. Axes are matched from the right, so "
    "it fails, or worse: in a square matrix it divides the columns",
    section="The annotated source",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().to(torch.int8), scale[:, None]


@round_rows.mistake(
    "the largest, not the largest magnitude",
    because="the formula says max. A row whose largest magnitude is negative then "
    "leaves the range",
)
def _(weight):
    weight = weight.float()
    scale = weight.amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale


@round_rows.mistake(
    "128 for 127",
    because="a byte has 256 values, and half of them is 128. But the integers end at "
    "127, and 128 wraps round to -128: the largest weight changes its sign",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 128
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().to(torch.int32).to(torch.int8), scale


@round_rows.mistake(
    "127.5 for 127",
    because="the chapter's own functions divide by it, to use all 256 levels, and so "
    "does torchao. Here the largest magnitude is to be a level itself",
    section="The ladder of equality",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale


@round_rows.mistake(
    "cut off for rounded",
    because="a cast to int8 makes integers by itself. It cuts the fraction off, "
    "towards 0: errors of up to a whole step, and every weight shrinks",
    section="How large is the error?",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).to(torch.int8), scale


@round_rows.mistake(
    "no scale for a row of zeros",
    because="no matrix of a test has one. 0 / 0 is NaN, and the cast may make a 0 of "
    "it, so nothing looks wrong; the next to divide by that scale finds out",
)
def _(weight):
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


@round_rows.mistake(
    "the scale upside down",
    because="one multiplies by 127 / max to get integers. What is stored is what gets "
    "the weights back, the size of a step",
)
def _(weight):
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = 127 / torch.where(largest == 0, 127.0, largest)
    return (weight * scale).round().to(torch.int8), scale


@round_rows.mistake(
    "all of it in half",
    because="weights in half give a scale in half, if nobody casts: 11 bits, in a "
    "number that multiplies a whole row",
    section="The annotated source",
)
def _(weight):
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale).to(weight.dtype)
    return (weight / scale).round().to(torch.int8), scale


@chapter.implement(
    title="four bits, and scales in half",
    minutes=15,
    difficulty="hard",
    section="What groups cost",
    text=r"""
With scales in float32 and groups of 32, four bits are five. Store the scales in half.
Each group of `group_size` neighbours in a row shares one: its largest magnitude divided
by 7.5, as in this chapter, rounded to half *first*. Then round the weights by the scale
that is stored. No group is all zeros.
""",
    hints=(
        "Whoever reads the file multiplies by the scale in half. For which scale must "
        "the integers be the nearest, then?",
        "With all 16 levels the largest magnitude is about half a step beyond 7. Which "
        "integers do four bits have?",
    ),
    proves="Each group of neighbours has its own scale in half, and its integers are "
    "the nearest to the weights for that scale, all of them from -8 to 7.",
    why="Because the weights are rounded by the scale that is stored, the scale's own "
    "rounding hardly matters: the cell below has it. llama.cpp's Q4_0 takes as much: "
    "18 bytes for 32 weights, 4.5 bits each.",
)
def round_groups(weight, group_size):
    """(R, C) -> int8 integers (R, C) and float16 scales (R, C / group_size)."""
    groups = weight.unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(dim=-1) / 7.5).half()
    steps = groups / scale.float()[..., None]
    return steps.round().clamp(-8, 7).to(torch.int8).flatten(1), scale


def telling_group(draw, size, scale):
    """Draw a group that its scale rounds otherwise before and after going to half.

    The largest magnitude is 7.5 scales, give or take what half takes away. One weight
    lies so near the middle of two levels that the two scales disagree about it, yet
    a thousand times further than float32's own rounding.
    """
    grows = draw.integer(0, 2)  # does the rounding to half make the scale larger?
    exact = 1 - 3e-4 if grows else 1 + 3e-4
    steps = draw.integers(-6, 7, size) + draw.uniform(size, low=-0.3, high=0.3)
    steps[0] = 7.5 * exact * (1 - 2 * draw.integer(0, 2))
    steps[1] = draw.integer(-6, 6) + (0.499 if grows else 0.501)
    return (steps * scale)[draw.permutation(size)]


@round_groups.cases
def _(draw):
    yield torch.tensor([[-7.4977, 5.499, 7.5023, 5.501]]), 2
    for rows, groups, size in ((2, 3, 4), (6, 2, 6), (8, 1, 16)):
        # so little above a power of two that half's steps are as coarse as they get
        scales = (1 + draw.integers(0, 50, rows, groups) / 1024) / 16
        drawn = [telling_group(draw, size, s) for s in scales.flatten().tolist()]
        yield torch.stack(drawn).view(rows, groups * size), size


@round_groups.also("group by group")
def _(weight, group_size):
    integers, scales = [], []
    for row in weight:
        groups = row.split(group_size)
        stored = [(group.abs().max() / 7.5).half() for group in groups]
        whole = [(g / s.float()).round() for g, s in zip(groups, stored, strict=True)]
        integers.append(torch.cat(whole).clamp(min=-8, max=7).to(torch.int8))
        scales.append(torch.stack(stored))
    return torch.stack(integers), torch.stack(scales)


@round_groups.also("a column of scales for each weight")
def _(weight, group_size):
    groups = weight.reshape(-1, group_size)
    scale = (torch.linalg.vector_norm(groups, float("inf"), dim=1) / 7.5).half()
    each = scale.view(len(weight), -1).repeat_interleave(group_size, dim=1)
    steps = torch.round(weight / each.to(weight.dtype))
    integers = torch.minimum(torch.maximum(steps, torch.tensor(-8)), torch.tensor(7))
    return integers.to(torch.int8), scale.view(len(weight), -1)


def wrong_groups(end=7.5, clamp=(-8, 7), divide_by=lambda stored, exact: stored):
    """Make a round_groups with one thing changed."""

    def rounded(weight, group_size):
        groups = weight.unflatten(1, (-1, group_size))
        exact = groups.abs().amax(dim=-1) / end
        steps = groups / divide_by(exact.half().float(), exact)[..., None]
        return steps.round().clamp(*clamp).to(torch.int8).flatten(1), exact.half()

    return rounded


round_groups.mistake(
    "rounded by a scale that is not stored",
    because="the exact scale is at hand, and more digits are better. But the reader of "
    "the file has only the rounded one",
)(wrong_groups(divide_by=lambda stored, exact: exact))
round_groups.mistake(
    "no clamp",
    because="dividing by the largest magnitude keeps numbers in range by itself. With "
    "7 it does. With 7.5 the largest may round to 8, which four bits store as -8",
    section="Eight weights by hand",
)(wrong_groups(clamp=(-99, 99)))
round_groups.mistake(
    "8 for 7.5",
    because="the lowest of the 16 integers is -8; the highest is 7, and half of all "
    "steps is 7.5",
    section="Eight weights by hand",
)(wrong_groups(end=8))
round_groups.mistake(
    "7 for 7.5",
    because="for eight bits most papers divide by 127, the highest integer. With four "
    "bits that is a level of 16 unused, and a step 7 % larger",
    section="The ladder of equality",
)(wrong_groups(end=7))
round_groups.mistake(
    "the same end on both sides",
    because="a symmetric range sounds as if it went from -7 to 7",
    section="Eight weights by hand",
)(wrong_groups(clamp=(-7, 7)))


@round_groups.mistake(
    "every n-th column in a group",
    because="`unflatten(1, (group_size, -1))` has the right numbers in the wrong "
    "order: the last axis holds neighbours",
    section="The annotated source",
)
def _(weight, group_size):
    groups = weight.unflatten(1, (group_size, -1))
    scale = (groups.abs().amax(dim=1) / 7.5).half()
    steps = groups / scale.float()[:, None]
    return steps.round().clamp(-8, 7).to(torch.int8).flatten(1), scale


@round_groups.mistake(
    "scales left in float32",
    because="arithmetic in float32 gives float32. A scale that is not stored as it was "
    "meant costs another half bit a weight",
)
def _(weight, group_size):
    groups = weight.unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(dim=-1) / 7.5).half().float()
    steps = groups / scale[..., None]
    return steps.round().clamp(-8, 7).to(torch.int8).flatten(1), scale


@round_groups.mistake(
    "a scale for the row",
    because="for int8 that was right. With four bits an outlier would cost the whole "
    "row",
    section="One weight costs the row",
)
def _(weight, group_size):
    scale = (weight.abs().amax(dim=1, keepdim=True) / 7.5).half()
    steps = weight / scale.float()
    return steps.round().clamp(-8, 7).to(torch.int8), scale


round_groups.equivalent(
    "return steps.round().clamp(- 9, 7).to(torch.int8).flatten(1), scale",
    because="no weight lies below -7.51 scales, so none rounds to -9",
)


@chapter.implement(
    title="reading two from a byte",
    minutes=10,
    difficulty="moderate",
    section="The annotated source",
    text="""
Somebody hands you bytes, and the scales of the groups in half. Make weights again, in
float32. A byte holds two integers of -8 to 7: the even column in its low four bits, the
odd one in its high four bits. The scales of a row stand in the order of its groups.
""",
    hints=(
        "`packed & 15` is one of the two. Which integer is 15, if four bits count from "
        "-8 to 7?",
        "The two come in turns: low, high, low, high. 8 to 15 stand for -8 to -1. How "
        "many columns does one scale serve?",
    ),
    proves="Every byte gives two integers in the right order and with the right sign, "
    "and each is multiplied by the scale of its own group, in float32.",
    why="Every bit pattern was in the inputs. `(halves ^ 8) - 8` is the chapter's way; "
    "taking 16 from what is above 7 is the same.",
)
def read_int4(packed, scale):
    """uint8 (R, C / 2) and float16 scales (R, groups) -> float32 weights (R, C)."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
    integers = torch.where(halves > 7, halves - 16, halves)
    size = integers.shape[1] // scale.shape[1]
    return integers * scale.float().repeat_interleave(size, dim=1)


@read_int4.cases
def _(draw):
    half = torch.float16
    yield (
        torch.tensor([[0x2F, 0xF7]], dtype=torch.uint8),
        torch.tensor([[1.0, 10.0]], dtype=half),
    )
    every = torch.tensor(draw.permutation(256), dtype=torch.uint8)
    for rows, groups in ((2, 4), (4, 1), (1, 16)):
        scale = draw.uniform(rows, groups, low=0.01, high=2.0).half()
        yield every.view(rows, -1), scale


@read_int4.also("byte by byte")
def _(packed, scale):
    cols, rows = 2 * packed.shape[1], []
    size = cols // scale.shape[1]
    for line, scales in zip(packed.tolist(), scale.tolist(), strict=True):
        integers = [half for byte in line for half in (byte % 16, byte // 16)]
        signed = [q if q < 8 else q - 16 for q in integers]
        rows.append([q * scales[i // size] for i, q in enumerate(signed)])
    return torch.tensor(rows)


@read_int4.also("shifted up, then down with the sign")
def _(packed, scale):
    signed = packed.view(torch.int8)
    integers = torch.stack(((signed << 4) >> 4, signed >> 4), dim=2)
    groups = integers.reshape(*scale.shape, -1).float()
    return (groups * scale.float()[..., None]).flatten(1)


def wrong_reader(
    halves=lambda packed: torch.stack((packed & 15, packed >> 4), -1).flatten(1).int(),
    sign=lambda q: torch.where(q > 7, q - 16, q),
    spread=lambda scale, size: scale.float().repeat_interleave(size, dim=1),
):
    """Make a read_int4 with one thing changed."""

    def read(packed, scale):
        integers = sign(halves(packed))
        return integers * spread(scale, integers.shape[1] // scale.shape[1])

    return read


read_int4.mistake(
    "the high half first",
    because="ChatGLM has it so, and in print the high half stands first. Sizes, sums "
    "and histograms cannot tell; the model talks nonsense",
    section="The other road: a quantised graph",
)(wrong_reader(halves=lambda p: torch.stack((p >> 4, p & 15), dim=-1).flatten(1).int()))
read_int4.mistake(
    "no sign",
    because="a half of a byte is a number from 0 to 15, and nothing complains when it "
    "stays one",
)(wrong_reader(sign=lambda q: q))
read_int4.mistake(
    "eight too many",
    because="some formats store the integer plus 8. Here the upper bit of a half is "
    "its sign, as in every signed integer: 15 is -1, not 7",
)(wrong_reader(sign=lambda q: q - 8))
read_int4.mistake(
    "all low halves, then all high ones",
    because="`cat` puts them one after the other. llama.cpp's files do stand so, "
    "within each block; here the columns of a byte are neighbours",
)(wrong_reader(halves=lambda p: torch.cat((p & 15, p >> 4), dim=1).int()))
read_int4.mistake(
    "a sign and a size",
    because="the upper bit is the sign, so the other three seem to be the size. In "
    "two's complement 1001 is 1 - 8",
)(wrong_reader(sign=lambda q: torch.where(q > 7, 8 - q, q)))
read_int4.mistake(
    "a sign for one half only",
    because="shifting an int8 down brings its sign along, so the high half is right. "
    "The low half was masked, and has none",
)(
    wrong_reader(
        halves=lambda p: torch.stack(
            (p.view(torch.int8) & 15, p.view(torch.int8) >> 4), dim=-1
        ).flatten(1),
        sign=lambda q: q,
    )
)
read_int4.mistake(
    "scales in turns",
    because="`repeat` sounds right. It gives neighbours the scales of different groups",
)(wrong_reader(spread=lambda scale, size: scale.float().repeat(1, size)))
read_int4.mistake(
    "weights in half",
    because="an integer times a tensor in half is in half: torch lets the float decide",
)(wrong_reader(spread=lambda scale, size: scale.repeat_interleave(size, dim=1)))


chapter.explain(
    "what_an_offset_buys",
    title="levels that are not even around 0",
    minutes=5,
    difficulty="moderate",
    section="The annotated source",
    text="""
Let each group have an offset too: its 16 levels run from its smallest weight to its
largest. On a matrix of SmolLM2 this gains 1.5 dB with groups of 32, but only 0.6 dB
with whole rows of 576. Many int4 formats have an offset, int8 rows have none. Why?
""",
    hints=(
        "Draw 32 numbers with mean 0. Are the smallest and the largest equally far "
        "from 0? And of 576?",
        "What does an offset add to the sum of integers in a product with a token's "
        "integers?",
    ),
    choices={
        "a": Choice(
            "An offset brings all 16 levels into use; without one there are only 15.",
            "That would be so if the scale were the largest magnitude divided by 7. "
            "With 7.5 all 16 levels are in use either way.",
        ),
        "b": Choice(
            "Few weights are seldom even around 0, many are; and in integer products "
            "an offset costs.",
            "The range of a few weights is lopsided, and the symmetric levels beyond "
            "its short end are wasted; a long row has hardly a short end. In a product "
            "an offset $z$ adds $z$ times the sum of the token's integers. Small "
            "groups are not multiplied as integers anyway.",
        ),
        "c": Choice(
            "Training has moved the weights to one side; small groups show it, and in "
            "long rows it is averaged out.",
            "Fresh random weights, evenly around 0, gain as much: the cell below tries "
            "them. It is a matter of how few they are, not of training.",
        ),
        "d": Choice(
            "Eight bits have no room for an offset: the integers of a row take all of "
            "a byte's values.",
            "An offset is stored once for each group, beside the scale, and a row of "
            "int8 would hardly notice the byte. It hardly needs it either.",
        ),
    },
    right="b",
)


chapter.explain(
    "what_int8_leaves",
    title="the way to four times smaller",
    minutes=5,
    difficulty="easy",
    section="A whole model",
    text="""
SmolLM2-135M has 538 MB in float32, and 220 MB after `int8-weight-only`: 2.4 times
smaller, and not four. What brings it nearest to four times, at the least loss?
""",
    hints=(
        "Which tensor did no scheme touch?",
        "It has 49,152 rows. Each is the vector of one token, and the tied head "
        "multiplies by the same rows.",
    ),
    choices={
        "a": Choice(
            "One scale for each matrix of the blocks, to save the scales of its rows.",
            "A row of 576 weights has one scale of 4 bytes: less than one byte in a "
            "hundred. Rows with small weights would pay for it.",
        ),
        "b": Choice(
            "`int4-grouped` instead.",
            "Then it is three times smaller, not four, and the KL is a hundred times "
            "that of int8: what is large is still in float32.",
        ),
        "c": Choice(
            "Eight bits for the activations as well.",
            "Activations are not stored: they come and go with each token. That saves "
            "time, not room, and costs ten times the KL.",
        ),
        "d": Choice(
            "Round the embedding too, with a scale for each row.",
            "113 MB of it are left in float32, more than half of what the file holds. "
            "In eight bits the whole is 135 MB, four times smaller, and its KL stays "
            "below that of `int8-dynamic`. A row is one token's vector, so its scale "
            "costs next to nothing.",
        ),
    },
    right="d",
)


@chapter.debug(
    title="what stands beside a token",
    minutes=10,
    difficulty="moderate",
    section="Integers times integers",
    text="""
A colleague's dynamic layer rounds each token to int8 as it comes. It works in all his
tests, which have one token a batch. In a prefill its outputs are bad, and whatever
stands *beside* a token changes the token's output. Mend it.
""",
    hints=(
        "Call it with one token, then with the same token and a loud one beside it. "
        "Which number changes?",
        "A token is rounded as if it were a row of weights. How many scales do T "
        "tokens have, and in which shape?",
    ),
    proves="A token's output is the same alone and among others, sums are exact, and "
    "both scales are where they belong.",
    why="One scale for all tokens: the loudest sets it. With `dim=-1, keepdim=True` a "
    "token is rounded as it would be alone. Test a batched layer against its rows. On "
    "SmolLM2 that is the difference between 31 dB and none: the cell below.",
)
def dynamic_product(x, integers, scale):
    """(T, C) tokens, int8 (R, C), scales (R, 1) -> (T, R), about x @ weight.T."""
    token_scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    p = (x / token_scale).round().clamp(-128, 127).to(torch.int8)
    sums = p.int() @ integers.int().T
    return sums * token_scale * scale.T


@dynamic_product.broken(
    "one scale for all tokens",
    because="with one token it is the token's own, and so every test with one token "
    "passes",
)
def _(x, integers, scale):
    token_scale = x.abs().max() / 127.5
    p = (x / token_scale).round().clamp(-128, 127).to(torch.int8)
    sums = p.int() @ integers.int().T
    return sums * token_scale * scale.T


def wrong_product(
    token_scale=lambda x: x.abs().amax(dim=-1, keepdim=True) / 127.5,
    whole=lambda steps: steps.round().clamp(-128, 127),
    total=lambda p, integers: p.int() @ integers.int().T,
    back=lambda sums, tokens, rows: sums * tokens * rows.T,
):
    """Make a dynamic_product with one thing changed."""

    def product(x, integers, scale):
        tokens = token_scale(x)
        p = whole(x / tokens).to(torch.int32).to(torch.int8)
        return back(total(p, integers), tokens, scale)

    return product


dynamic_product.mistake(
    "a scale for each feature",
    because="the features that stand out are what one wants to treat apart. But such a "
    "scale is inside the sum, and cannot come out of it",
)(wrong_product(token_scale=lambda x: x.abs().amax(dim=0, keepdim=True) / 127.5))
dynamic_product.mistake(
    "the largest, not the largest magnitude",
    because="the largest comes out positive in every first test. A token whose largest "
    "magnitude is negative then leaves the range",
    section="Eight weights by hand",
)(wrong_product(token_scale=lambda x: x.amax(dim=-1, keepdim=True) / 127.5))
dynamic_product.mistake(
    "sums in int8",
    because="int8 times int8 is int8 in torch, and so is the sum of such products: it "
    "wraps round at 128",
)(wrong_product(total=lambda p, integers: p @ integers.T))
dynamic_product.mistake(
    "the scales of the rows as they stand",
    because="(R, 1) is the scale's shape, and it multiplies (T, R) without a word when "
    "T is R, or 1: it has to lie along the outputs",
)(wrong_product(back=lambda sums, tokens, rows: sums * tokens * rows))
dynamic_product.mistake(
    "the tokens' scale is gone",
    because="the weights' scale is in the layer, and one thinks of it; that of the "
    "tokens was made a moment ago, and is to be multiplied back as well",
)(wrong_product(back=lambda sums, tokens, rows: sums * rows.T))
dynamic_product.mistake(
    "the largest wraps round",
    because="after dividing by the largest a clamp looks idle. 127.5 rounds to 128, "
    "which int8 does not have",
    section="Eight weights by hand",
)(wrong_product(whole=torch.round))
dynamic_product.mistake(
    "tokens cut off for rounded",
    because="the cast to int8 seems to do the rounding",
    section="How large is the error?",
)(wrong_product(whole=lambda steps: steps.clamp(-128, 127).trunc()))


@dynamic_product.mistake(
    "tokens left in float",
    because="the result is nearer to the true one. It is no longer a product of "
    "integers, which is what the processor is quick at",
)
def _(x, integers, scale):
    return x @ (integers * scale).T


@dynamic_product.cases
def _(draw):
    for tokens, rows, cols in ((1, 2, 2), (2, 3, 4), (5, 5, 16), (6, 3, 64)):
        x = off_the_edge(draw, tokens, cols, 127.5)
        x = x * 10.0 ** torch.arange(tokens)[:, None]
        integers = draw.integers(-128, 128, rows, cols).to(torch.int8)
        if tokens > 1:
            # The last token's largest magnitude is negative. It may round to -127 or
            # to -128, so it meets zeros only.
            x[-1] = -x[-1]
            integers[:, x[-1].argmin()] = 0
        yield x, integers, draw.uniform(rows, 1, low=0.01, high=0.1)


@dynamic_product.also("token by token, row by row")
def _(x, integers, scale):
    lines = []
    for token in x:
        step = token.abs().max() / 127.5
        p = [min(127, max(-128, round(v))) for v in (token / step).tolist()]
        sums = [
            sum(a * b for a, b in zip(p, q, strict=True)) for q in integers.tolist()
        ]
        lines.append(torch.tensor(sums) * step * scale[:, 0])
    return torch.stack(lines)


@dynamic_product.also("the package's rounding")
def _(x, integers, scale):
    from annotated_src.quantize import quantize_groups

    tokens, token_scale = quantize_groups(x, 8)
    sums = torch.einsum("tc,rc->tr", tokens.double(), integers.double())
    return (sums * token_scale * scale.squeeze(1)).float()


dynamic_product.equivalent(
    "token_scale = x.abs().amax(dim=+1, keepdim=True) / 127.5",
    because="of two axes, 1 and -1 are the same",
)
dynamic_product.equivalent(
    "p = (x / token_scale).round().clamp(- 129, 127).to(torch.int8)",
    because="no token goes below -127.5 of its scales, which rounds to -128",
)
dynamic_product.equivalent(
    "p = (x / token_scale).round().clamp(- 127, 127).to(torch.int8)",
    because="only -127.5 rounds to -128, and -127 is as near to it: either will do",
)
