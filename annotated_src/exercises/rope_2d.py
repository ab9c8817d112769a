"""Exercises on ChatGLM's two positions, and on angles formed in half precision."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/03_rope_2d", "RoPE in two dimensions")


@chapter.implement(
    title="two clocks in one head",
    minutes=12,
    difficulty="moderate",
    section="Two numbers, one head",
    text="""
Write ChatGLM's rotation without looking it up: the first half of a head turns by place
(row 0 of the positions), the second half by step (row 1). Each half is a small RoPE of
its own, with pairs half-split inside. A positive angle takes $(1, 0)$ towards $(0, 1)$.
""",
    hints=(
        "Cut the head in the middle and turn one half after the other. Where are the "
        "two numbers of a pair inside a half?",
        r"Pair $i$ of a half $h$ is $(h_i, h_{i+R})$ for $R$ frequencies, and becomes "
        r"$(h_i \cos - h_{i+R} \sin,\; h_i \sin + h_{i+R} \cos)$. Angles have the "
        r"shape (B, 1, T, R).",
    ),
    proves="Each half turns by its own row of positions, in each row of the batch, "
    "with the right pairs and in the right direction; also at far positions, and at "
    "positions that start anywhere.",
    atol=2e-3,  # room for angles of 3000 radians in float32
)
def turn_two_clocks(x, positions, frequencies):
    """(B, heads, T, 4R), positions (B, 2, T), frequencies (R) -> (B, heads, T, 4R)."""
    turned = []
    for half, row in zip(x.chunk(2, dim=-1), positions.unbind(1), strict=True):
        angles = row[:, None, :, None] * frequencies  # (B, 1, T, R)
        cos, sin = angles.cos(), angles.sin()
        a, b = half.chunk(2, dim=-1)
        turned += [a * cos - b * sin, a * sin + b * cos]
    return torch.cat(turned, dim=-1)


@turn_two_clocks.cases
def _(draw):
    quarter = math.pi / 2
    x = torch.tensor([[1.0, 2, 3, 4]])[None, None]
    yield x, torch.tensor([[[1], [2]]]), torch.tensor([quarter])
    x = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]])[:, None, None]
    yield x, torch.tensor([[[1], [2]], [[2], [3]]]), torch.tensor([quarter])
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])[None, None]
    yield x, torch.tensor([[[1], [2]]]), torch.tensor([quarter, 2 * quarter])
    x, positions = draw.normal(1, 1, 3, 8), torch.tensor([[[3, 1, 1], [0, 1, 2]]])
    yield x, positions, torch.tensor([1.0, 0.1])
    for batch, heads, length, pairs in ((3, 2, 5, 2), (2, 3, 4, 4)):
        x = draw.normal(batch, heads, length, 4 * pairs, dtype=torch.float64)
        frequencies = draw.uniform(pairs, low=0.2, high=1.5).double()
        yield x, draw.integers(0, 2000, batch, 2, length), frequencies


turn_two_clocks.equivalent(
    "for half, row in zip(x.chunk(2, dim=-1), positions.unbind(1), strict=False):",
    because="there are two halves and two rows",
)


@turn_two_clocks.also("loops")
def _(x, positions, frequencies):
    out, pairs = x.clone(), len(frequencies)
    for b, row, t, i in torch.cartesian_prod(
        *map(torch.arange, (len(x), 2, x.shape[2], pairs))
    ).tolist():
        angle = float(positions[b, row, t] * frequencies[i])
        u, v = 2 * pairs * row + i, 2 * pairs * row + i + pairs
        a, c = x[b, :, t, u], x[b, :, t, v]
        out[b, :, t, u] = math.cos(angle) * a - math.sin(angle) * c
        out[b, :, t, v] = math.sin(angle) * a + math.cos(angle) * c
    return out


@turn_two_clocks.also("complex numbers")
def _(x, positions, frequencies):
    real, imaginary = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, heads, T, half, R)
    angles = positions.mT[:, None, :, :, None] * frequencies  # (B, 1, T, half, R)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles)
    return torch.stack((turned.real, turned.imag), dim=-2).flatten(-3)


@turn_two_clocks.also("rotate_half")
def _(x, positions, frequencies):
    angles = positions[:, None, :, :, None] * frequencies  # (B, 1, half, T, R)
    angles = torch.cat((angles, angles), dim=-1).transpose(2, 3)
    halves = x.unflatten(-1, (2, -1))
    a, b = halves.chunk(2, dim=-1)
    turned = halves * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()
    return turned.flatten(-2)


def wrong_clocks(rows=lambda positions: positions.unbind(1), turn=None):
    """Make a rotation with other positions, or with another turn of a half."""

    def half_turned(half, angles):
        a, b = half.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def turned(x, positions, frequencies):
        parts = zip(x.chunk(2, dim=-1), rows(positions), strict=True)
        each = turn or half_turned
        return torch.cat(
            [each(half, at[:, None, :, None] * frequencies) for half, at in parts],
            dim=-1,
        )

    return turned


def counted(positions):
    """Count from 0, in the shape of one row of the positions: (B, T)."""
    return torch.arange(positions.shape[-1]).expand(len(positions), -1)


turn_two_clocks.mistake(
    "halves swapped",
    because="nothing in the numbers says which half is for which. Row 0, the place, "
    "comes first",
)(wrong_clocks(lambda positions: positions.flip(1).unbind(1)))
turn_two_clocks.mistake(
    "one row of positions for both",
    because="a RoPE takes one position for all of a head",
    section="What a score sees",
)(wrong_clocks(lambda positions: (positions[:, 0], positions[:, 0])))
turn_two_clocks.mistake(
    "the step left out",
    because="without an answer all steps are 0, so on a prompt's context it is right",
    section="What a score sees",
)(wrong_clocks(lambda positions: (positions * torch.tensor([[1], [0]])).unbind(1)))
turn_two_clocks.mistake(
    "the two numbers added",
    because="one number would do if it told all tokens apart. Place + step does not: "
    "the answer lands on the words right of the blank",
    section="What a score sees",
)(wrong_clocks(lambda positions: (positions.sum(dim=1), positions.sum(dim=1))))
turn_two_clocks.mistake(
    "positions from arange",
    because="in Llama places count from 0 without a gap, and in the context they do "
    "here, too. In the answer they stand still",
)(wrong_clocks(lambda positions: (counted(positions), positions[:, 1])))
turn_two_clocks.mistake(
    "the first row's positions for the batch",
    because="in Llama all rows of a batch count alike. Here each row has its own blank",
    section="The ladder of equality",
)(wrong_clocks(lambda positions: positions[:1].expand_as(positions).unbind(1)))
turn_two_clocks.mistake(
    "neighbours paired",
    because="the paper pairs 2i with 2i + 1. ChatGLM's code pairs i with i + R, in "
    "each half",
)(
    wrong_clocks(
        turn=lambda half, angles: torch.view_as_real(
            torch.view_as_complex(half.unflatten(-1, (-1, 2)).contiguous())
            * torch.exp(1j * angles)
        ).flatten(-2)
    )
)
turn_two_clocks.mistake(
    "the other way round",
    because="the minus sign stands with one of two sines, and lengths and relative "
    "angles look right with either",
    section="What a score sees",
)(wrong_clocks(lambda positions: (-positions).unbind(1)))


@turn_two_clocks.mistake(
    "paired over the whole head",
    because="`rotate_half` cuts whatever it is given in the middle, and it is given "
    "the whole head",
)
def _(x, positions, frequencies):
    angles = (positions[:, None, :, :, None] * frequencies).transpose(2, 3)
    angles = angles.repeat(1, 1, 1, 1, 2).flatten(-2)  # as wide as the head
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()


@chapter.implement(
    title="cosines as the original makes them",
    minutes=8,
    difficulty="moderate",
    section="The price of half, second part: a staircase",
    text="""
A faithful port copies the rounding. Write the cosines by which one half of a head
turns. ChatGLM-6B rounds its frequencies to float16 when it is built, in a float32 model
too. Positions, angles and cosines have the `dtype` of the model. `width` is that of the
half, and frequency $i$ is $\\text{base}^{-2i/\\text{width}}$.
""",
    hints=(
        "How many frequencies has a half of this width? Which are rounded, and in "
        "which models?",
        "Round the frequencies to float16, then cast them and the positions to "
        "`dtype`, and only then multiply.",
    ),
    proves="Frequencies are rounded to float16 in every model, and angles are formed "
    "in the model's own dtype, for several widths and bases, near and far.",
    atol=2e-3,
    why="Two roundings: the frequencies', always, and the angles', in a half-precision "
    "model. Rounding less would be better mathematics and another model.",
)
def chatglm_cosines(positions, width, base, dtype):
    """Positions (T), whole numbers -> cosines (T, width / 2), of `dtype`."""
    exponents = torch.arange(0, width, 2) / width
    frequencies = (1 / base**exponents).half()
    angles = positions.to(dtype)[:, None] * frequencies.to(dtype)
    return angles.cos()


@chatglm_cosines.cases
def _(draw):
    for dtype in (torch.float32, torch.float16):
        yield torch.tensor([2000]), 4, 1e4, dtype
        yield torch.tensor([0, 1, 1366, 1367, 2047]), 8, 1e4, dtype
        yield draw.integers(1000, 2048, 6), 6, 1e3, dtype
        yield draw.integers(1000, 2048, 8), 12, 500.0, dtype
        yield draw.integers(1000, 2048, 20), 64, 1e4, dtype


@chatglm_cosines.also("loops")
def _(positions, width, base, dtype):
    theta = [torch.tensor(base ** (-2 * i / width)).half() for i in range(width // 2)]
    rows = [[p.to(dtype) * f.to(dtype) for f in theta] for p in positions]
    return torch.tensor([[math.cos(a) for a in row] for row in rows], dtype=dtype)


@chatglm_cosines.also("a table, then rows of it")
def _(positions, width, base, dtype):
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = torch.exp(-math.log(base) * 2 * pairs / width).half().to(dtype)
    every = torch.arange(int(positions.max()) + 1).to(dtype)
    return torch.outer(every, frequencies).cos()[positions]


def wrong_cosines(
    rounded: torch.dtype | None = torch.float16,
    formed: torch.dtype | None = None,
    exponent=lambda width: torch.arange(0, width, 2) / width,
    base_used=None,
):
    """Make cosines with other roundings of frequency and angle, exponents or base."""

    def cosines(positions, width, base, dtype):
        frequencies = 1 / (base_used or base) ** exponent(width)
        frequencies = frequencies.to(rounded or dtype)
        inside = formed or dtype
        angles = positions.to(inside)[:, None] * frequencies.to(inside)
        return angles.cos().to(dtype)

    return cosines


chatglm_cosines.mistake(
    "frequencies in the model's dtype",
    because="a float32 model seems to have float32 frequencies. The original has "
    "rounded them before, and casting brings no digit back",
    section="The price of half, first part: other frequencies",
)(wrong_cosines(rounded=None))
chatglm_cosines.mistake(
    "angles in float32, then cast",
    because="that is how Llama does it, and how it should be done. The original forms "
    "them in the model's dtype",
)(wrong_cosines(formed=torch.float32))
chatglm_cosines.mistake(
    "exact angles",
    because="more digits are better. Not for weights that were published with fewer",
    section="The ladder of equality",
)(wrong_cosines(rounded=torch.float32, formed=torch.float32))
chatglm_cosines.mistake(
    "half precision in every model",
    because="the frequencies are float16, and what is multiplied with them seems to "
    "follow. In a float32 model they are cast up first",
)(wrong_cosines(formed=torch.float16))
chatglm_cosines.mistake(
    "the frequencies of a full head",
    because="the exponent has the width of the whole head in Llama. Here each half is "
    "a head of its own, half as wide",
    section="What a score sees",
)(wrong_cosines(exponent=lambda width: torch.arange(width // 2) / width))
chatglm_cosines.mistake(
    "down to 1 / base exactly",
    because="frequencies from 1 to 1 / base sound as if both ends were there. The last "
    "one is a step short",
    section="What a score sees",
)(wrong_cosines(exponent=lambda width: torch.linspace(0, 1, width // 2)))
chatglm_cosines.mistake(
    "base 10,000 whatever is asked",
    because="ChatGLM-6B's base is a number in its code. Here it is an argument",
    section="What a score sees",
)(wrong_cosines(base_used=1e4))


chapter.explain(
    "place_plus_step",
    title="one number for two",
    minutes=6,
    difficulty="moderate",
    section="What a score sees",
    text="""
Somebody turns the whole head by one number, place + step. Take
`the cat slept on [MASK] all day <sop> my red mat`: places 0 to 6, then 4, 4, 4, 4;
steps 0 in the context, then 1, 2, 3, 4. What is lost?
""",
    hints=(
        "Write the sums of all eleven tokens side by side.",
        "0 1 2 3 4 5 6 for the context, 5 6 7 8 for the answer. Where, by its angles, "
        "does the answer stand?",
    ),
    choices={
        "a": Choice(
            "Nothing: no two tokens have the same sum.",
            "`<sop>` is at 4 + 1 = 5, and so is `all`; `my` and `day` are both at 6. "
            "It is pairs of numbers that no two tokens share.",
        ),
        "b": Choice(
            "The answer stands on top of the words right of the blank.",
            "`<sop>` at 5 like `all`, `my` at 6 like `day`. To `red`, at 7, `day` is "
            "one token back and so is `my`: the left neighbour in the answer and a "
            "word that comes after the answer, at the same distance and in the same "
            "direction.",
        ),
        "c": Choice(
            "The answer's tokens cannot be told apart: all are at place 4.",
            "Their steps differ, so their sums do: 5, 6, 7, 8. That would be place "
            "alone.",
        ),
        "d": Choice(
            "Scores no longer depend on distances.",
            "They do: any single number that turns makes scores depend on differences "
            "of that number. But it is one distance where there were two.",
        ),
    },
    right="b",
)


chapter.explain(
    "worst_frequency",
    title="which error counts",
    minutes=8,
    difficulty="hard",
    section="The price of half, first part: other frequencies",
    text="""
Rounded to float16, the worst of 32 frequencies of base 10,000 is off by 0.04% of
itself, and the worst of base 100,000 (SmolLM2's) by 0.17%. It is that base's slowest
pair, 0.000014 radians a position. Whose *angle* is further off at position 2047?
""",
    hints=(
        "An angle's error is position times frequency times the relative error.",
        "How far has the slowest pair turned by position 2047, all in all?",
    ),
    choices={
        "a": Choice(
            "That of base 10,000, by far.",
            "The error is $m\\,\\theta\\,\\delta$: 0.0035 radians for base 10,000, "
            "and 0.00005 for the slow pair of base 100,000, which has turned by 0.03 "
            "radians in all. The relative error misleads: so slow a hand has hardly "
            "moved.",
        ),
        "b": Choice(
            "That of base 100,000, four times as far.",
            "So the relative errors say. But an angle counts modulo a turn, so its "
            "*absolute* error matters, and that has the frequency as a factor.",
        ),
        "c": Choice(
            "Both alike: float16 errs by one part in 2048 at most.",
            "That holds from $2^{-14}$ up. Below, float16 has fewer digits left: 0.17% "
            "is more than one part in 2048, 0.05%. And alike in relative terms would "
            "not be alike in radians.",
        ),
        "d": Choice(
            "That of base 100,000: so small a frequency becomes 0.",
            "float16 goes down to $2^{-24}$, 0.00000006, with fewer and fewer digits. "
            "No frequency becomes 0.",
        ),
    },
    right="a",
)


@chapter.debug(
    title="the table that ends too soon",
    minutes=6,
    difficulty="easy",
    section="The annotated source",
    text="""
A chat works for weeks, then raises an error in one conversation, a dozen tokens into a
fine answer. This makes the cosines for both clocks: a table with a row for every
position, then a look-up. Mend it.
""",
    hints=(
        "The traceback names a line. What was looked up there, and how long is the "
        "table?",
        "A short question with a long answer: which of the two numbers is the larger "
        "one?",
    ),
    proves="The table reaches every position of both rows, in all rows of the batch, "
    "in a prompt and in a single step of decoding.",
    why="The table was as long as the largest *place* asks. Steps look themselves up "
    "in the same table, and run out of it when an answer outgrows its question.",
)
def clock_cosines(positions, frequencies):
    """Positions (B, 2, T), frequencies (R) -> cosines (B, 2, T, R)."""
    num_rows = int(positions.max()) + 1
    angles = torch.arange(num_rows)[:, None] * frequencies
    table = angles.cos()
    return table[positions]


@clock_cosines.broken(
    "as long as the places ask",
    because="the place counts through the text, and the text is the long part, until "
    "an answer is longer",
)
def _(positions, frequencies):
    num_rows = int(positions[:, 0].max()) + 1
    angles = torch.arange(num_rows)[:, None] * frequencies
    table = angles.cos()
    return table[positions]


def wrong_table(
    length=lambda positions: int(positions.max()) + 1, look=lambda at, num_rows: at
):
    """Make cosines from a table of another length, or looked up elsewhere."""

    def cosines(positions, frequencies):
        num_rows = length(positions)
        table = (torch.arange(num_rows)[:, None] * frequencies).cos()
        return table[look(positions, num_rows)]

    return cosines


def places_end(positions):
    """Count the rows that the places ask for."""
    return int(positions[:, 0].max()) + 1


clock_cosines.mistake(
    "late steps held at the end",
    because="clamping takes the error away. The late tokens then share one position",
)(wrong_table(places_end, lambda at, num_rows: at.clamp(max=num_rows - 1)))
clock_cosines.mistake(
    "late steps start again",
    because="a clock goes round, so a remainder looks right. A table of whole "
    "positions does not end at a whole turn",
)(wrong_table(places_end, lambda at, num_rows: at % num_rows))
clock_cosines.mistake(
    "one row too few",
    because="the largest position looks like the number of positions; they count from "
    "0",
)(wrong_table(lambda positions: int(positions.max())))
clock_cosines.mistake(
    "the first text's table for the batch",
    because="one text was the test. In a batch each has its own longest part",
)(wrong_table(lambda positions: int(positions[0].max()) + 1))
clock_cosines.mistake(
    "as long as the call",
    because="no position reaches the number of tokens, in a prompt. In decoding a call "
    "has one token, and its positions go on",
)(wrong_table(lambda positions: positions.shape[-1]))
clock_cosines.mistake(
    "2048 rows, always",
    because="ChatGLM-6B was made for texts of up to 2048 tokens. Nothing keeps a text "
    "from being longer, and there it ends as before, with an error",
)(wrong_table(lambda positions: 2048))
clock_cosines.mistake(
    "steps counted from 0",
    because="step 1 is the first one, and the first row is row 0. But row 0 belongs to "
    "step 0, which the whole context has; -1 is the *last* row",
    section="Two numbers, one head",
)(wrong_table(look=lambda at, num_rows: at - torch.tensor([[0], [1]])))


@clock_cosines.cases
def _(draw):
    some = torch.tensor([1.0, 0.3])
    yield torch.tensor([[[0, 1, 2, 1], [0, 0, 0, 1]]]), some
    yield torch.tensor([[[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]]), some
    yield torch.tensor([[[4], [4]], [[6], [2]]]), some  # one token of an answer
    yield torch.tensor([[[3], [9]], [[7], [2]]]), some
    late = torch.tensor([[[2499, 2500, 2500, 2500, 2500], [0, 0, 1, 2, 3]]])
    yield late, torch.tensor([1.0, 0.25])
    positions = draw.integers(0, 20, 3, 2, 25)
    positions[0] = positions[0].clamp(max=10)
    positions[1:, :, 3] = torch.tensor([[23, 17], [18, 20]])
    yield positions, draw.uniform(3, low=0.2, high=1.5)


clock_cosines.equivalent(
    "num_rows = int(positions.max()) + 2",
    because="a longer table has a row that nobody asks for",
)


@clock_cosines.also("no table")
def _(positions, frequencies):
    return (positions[..., None] * frequencies).cos()


@clock_cosines.also("loops")
def _(positions, frequencies):
    table = {p: (p * frequencies).cos() for p in set(positions.flatten().tolist())}
    rows = [table[p] for p in positions.flatten().tolist()]
    return torch.stack(rows).view(*positions.shape, -1)
