"""Exercises on the feed-forward layer and its bend."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/02_activations", "Activations")


@chapter.implement(
    title="gate and up in one matrix",
    minutes=8,
    difficulty="moderate",
    section="Gates",
    text="""
Some checkpoints (Phi-3, GLM-4) store gate and up as one matrix of shape `(2F, D)`, the
gate's rows on top. Write `packed_feed_forward`, the SwiGLU layer of such a model, with
one product for both.
""",
    hints=(
        "One product gives 2F numbers for each token. Which of them open the gate, and "
        "which go through?",
        "Cut the *last* axis into two halves. The bend belongs to one of them only.",
    ),
    proves="The upper half of the rows opens the gate, with SiLU, for the lower half, "
    "and the last matrix brings the product back to the model's width.",
)
def packed_feed_forward(x, gate_up, down):
    """(B, T, D), (2F, D) with the gate on top, (D, F) -> (B, T, D)."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)  # (B, T, F) each
    return (gate * torch.sigmoid(gate) * up) @ down.T


@packed_feed_forward.cases
def _(draw):
    yield (
        torch.tensor([[[1.0, 2.0]]]),
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, -1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    )
    for batch, tokens, width, hidden in ((2, 3, 4, 6), (1, 4, 5, 3)):
        weights = draw.normal(2 * hidden, width), draw.normal(width, hidden)
        yield draw.normal(batch, tokens, width), *weights


@packed_feed_forward.also("loops")
def _(x, gate_up, down):
    ffn_dim = down.shape[1]
    out = torch.zeros_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        token = x[tuple(place)]
        for unit in range(ffn_dim):
            gate = torch.dot(gate_up[unit], token)
            up = torch.dot(gate_up[ffn_dim + unit], token)
            out[tuple(place)] += gate / (1 + torch.exp(-gate)) * up * down[:, unit]
    return out


@packed_feed_forward.also("torch.nn.functional")
def _(x, gate_up, down):
    functional = torch.nn.functional
    gate, up = functional.linear(x, gate_up).tensor_split(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


@packed_feed_forward.also("einsum")
def _(x, gate_up, down):
    both = torch.einsum("btd,pfd->pbtf", x, gate_up.unflatten(0, (2, -1)))
    return torch.einsum(
        "btf,df->btd", torch.nn.functional.silu(both[0]) * both[1], down
    )


@packed_feed_forward.also("the package's layer")
def _(x, gate_up, down):
    from annotated_src.activations import silu
    from annotated_src.feed_forward import GatedFeedForward

    layer = GatedFeedForward(x.shape[-1], down.shape[1], silu).requires_grad_(False)
    weights = (*gate_up.chunk(2), down)
    layer.load_state_dict(dict(zip(layer.state_dict(), weights, strict=True)))
    return layer.to(x.dtype)(x)


def packed_with(cut=lambda both: both.chunk(2, dim=-1), gated=None):
    """Make a packed layer that cuts or gates in another way."""
    silu = torch.nn.functional.silu

    def layer(x, gate_up, down):
        gate, up = cut(x @ gate_up.T)
        return (gated(gate, up) if gated else silu(gate) * up) @ down.T

    return layer


packed_feed_forward.mistake(
    "up on top",
    because="the halves have the same shape, and nothing complains when one stands in "
    "for the other; the output even looks healthy",
    section="The ladder of equality",
)(packed_with(cut=lambda both: both.chunk(2, dim=-1)[::-1]))
packed_feed_forward.mistake(
    "every other row a gate",
    because="pairs are often stored as neighbours; here the two matrices lie one below "
    "the other",
)(packed_with(cut=lambda both: (both[..., 0::2], both[..., 1::2])))
packed_feed_forward.mistake(
    "both halves bent",
    because="one product, one activation, as in a plain layer. In a gated layer what "
    "goes through is not bent",
)(packed_with(gated=lambda gate, up: packed_silu(gate) * packed_silu(up)))
packed_feed_forward.mistake(
    "sigmoid for SiLU",
    because="a gate sounds like a number between 0 and 1, and the first gated linear "
    "unit had a sigmoid (torch's `glu` still has). In SwiGLU it is SiLU",
)(packed_with(gated=lambda gate, up: torch.sigmoid(gate) * up))
packed_feed_forward.mistake(
    "GELU for SiLU",
    because="both bends look alike and both kinds of layers exist: with GELU it is "
    "GEGLU, Gemma's",
    section="SiLU, and the dip",
)(packed_with(gated=lambda gate, up: torch.nn.functional.gelu(gate) * up))
packed_feed_forward.mistake(
    "added for multiplied",
    because="residual streams add, and this looks like one; but a gate lets through, "
    "which is a product",
    section="Two units that multiply",
)(packed_with(gated=lambda gate, up: packed_silu(gate) + up))
packed_feed_forward.mistake(
    "the up half not used",
    because="in a plain layer nothing follows the bend but the last matrix, and "
    "without the product every shape is right as well",
)(packed_with(gated=lambda gate, up: packed_silu(gate)))


def packed_silu(x):
    """Weigh x by its own sigmoid."""
    return torch.nn.functional.silu(x)


@chapter.implement(
    title="why 11008?",
    minutes=5,
    difficulty="easy",
    section="The price: a third matrix",
    text=r"""
Meta's rule for the width of the feed-forward layer: take two thirds of four times the
model's width, and cut to an integer. Multiply by `multiplier`, and cut again. Then
round up to a multiple of `multiple_of`. Write `llama_ffn_dim`. It should give 11008 for
4096, 256 and 1.0 (Llama-2-7B), 28672 for 8192, 4096 and 1.3 (Llama-2-70B), and 14336
for 4096, 1024 and 1.3 (Llama-3-8B).
""",
    hints=(
        "Four steps in this order: two thirds, cut, multiply, cut. Only then the "
        "multiple.",
        "How many multiples does it take to cover the width? What if it is one "
        "already?",
    ),
    proves="Both cuts and the rounding up happen in the right order, also where the "
    "width is a multiple already.",
)
def llama_ffn_dim(embed_dim, multiple_of, multiplier):
    """Two ints and a float -> the width F, an int."""
    width = int(multiplier * int(2 * (4 * embed_dim) / 3))
    return math.ceil(width / multiple_of) * multiple_of


@llama_ffn_dim.cases
def _(draw):
    yield 5, 1, 1.5  # 13.33, cut to 13, then 19.5: without the first cut it is 20
    yield 4, 1, 1.0  # 10.67 is cut to 10
    yield 5, 4, 1.0
    yield 7, 10, 1.5
    yield from (
        (576, 256, 1.0),
        (4096, 256, 1.0),
        (8192, 4096, 1.3),
        (4096, 1024, 1.3),
    )
    yield 3 * draw.integer(50, 99), 8, 1.0


@llama_ffn_dim.also("whole numbers")
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * (8 * embed_dim // 3))
    return -(-width // multiple_of) * multiple_of


@llama_ffn_dim.also("multiple by multiple")
def _(embed_dim, multiple_of, multiplier):
    width, rounded = int(multiplier * int(8 * embed_dim / 3)), 0
    while rounded < width:
        rounded += multiple_of
    return rounded


@llama_ffn_dim.also("what is missing, added")
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * int(2 * 4 * embed_dim / 3))
    return width + -width % multiple_of


@llama_ffn_dim.mistake(
    "one cut for two",
    because="8/3 times the multiplier is one factor on paper; cutting once can give "
    "one more, and rounding up hides that almost everywhere",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * 2 * (4 * embed_dim) / 3)
    return math.ceil(width / multiple_of) * multiple_of


@llama_ffn_dim.mistake(
    "rounded where it is to be cut",
    because="both make an integer; `round` takes the nearest one, `int` drops what "
    "stands behind the point",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * round(2 * (4 * embed_dim) / 3))
    return math.ceil(width / multiple_of) * multiple_of


@llama_ffn_dim.mistake(
    "rounded down",
    because="`//` cuts, and so does `int`; the last step rounds up",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * int(2 * (4 * embed_dim) / 3))
    return width // multiple_of * multiple_of


@llama_ffn_dim.mistake(
    "rounded to the nearest multiple",
    because="`round` is what rounding is called; 10922 is nearer to 11008 than to "
    "10752, so the best-known model does not tell",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * int(2 * (4 * embed_dim) / 3))
    return math.floor(width / multiple_of + 0.5) * multiple_of


@llama_ffn_dim.mistake(
    "one multiple too many",
    because="`// multiple_of + 1` rounds up, except where nothing is left to round",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * int(2 * (4 * embed_dim) / 3))
    return (width // multiple_of + 1) * multiple_of


@llama_ffn_dim.mistake(
    "the multiplier last",
    because="a factor can be applied at any time, in exact arithmetic; after the "
    "rounding it spoils the multiple",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(2 * (4 * embed_dim) / 3)
    return int(multiplier * math.ceil(width / multiple_of) * multiple_of)


@llama_ffn_dim.mistake(
    "the plain layer's width",
    because="four times the model's width is the rule that everybody knows; with a "
    "third matrix it costs half as much again",
)
def _(embed_dim, multiple_of, multiplier):
    width = int(multiplier * 4 * embed_dim)
    return math.ceil(width / multiple_of) * multiple_of


chapter.explain(
    "bilinear_layer",
    title="a gate without a bend",
    minutes=5,
    difficulty="moderate",
    section="Two units that multiply",
    text=r"""
Shazeer also tried a gated layer without any bend, "bilinear":
$W_{\text{down}}\,(W_{\text{gate}}\,x \odot W_{\text{up}}\,x)$. Every part of it is
linear. Does it collapse to one matrix, as two matrices without a bend do?
""",
    hints=(
        "Give it twice the input. What does a matrix do, and what does this layer?",
        "Each factor doubles. And how did two gated units with SiLU make a product?",
    ),
    choices={
        "a": Choice(
            "Yes: linear parts make a linear whole.",
            "If they come one after the other, yes. Here two of them are multiplied: "
            "twice the input gives four times the output, which no matrix does.",
        ),
        "b": Choice(
            "No, because gate and up are different matrices.",
            "So are the two matrices of a plain layer, and they collapse. And with "
            "gate and up *equal* this layer would give squares, which do not.",
        ),
        "c": Choice(
            "No; and a layer with a bend in its gate cannot do what it does.",
            "It does not collapse, but SwiGLU can do the same, exactly: "
            r"$\mathrm{SiLU}(a)\,b - \mathrm{SiLU}(-a)\,b = ab$, two units for each of "
            "its units.",
        ),
        "d": Choice(
            "No: its output is quadratic; SwiGLU with twice the units does the same.",
            "Each factor is linear in $x$, their product is quadratic: the gate is a "
            "bend of its own. And since "
            r"$\mathrm{SiLU}(a)\,b - \mathrm{SiLU}(-a)\,b = ab$, two SwiGLU units are "
            "one bilinear unit.",
        ),
    },
    right="d",
)


@chapter.debug(
    title="which GELU is this?",
    minutes=8,
    difficulty="moderate",
    section="GELU is a random gate, averaged",
    text=r"""
A colleague's port should use the exact GELU. You compare it with `gelu_exact` on a fine
grid: the largest difference is 0.0203, at $x = \pm 2.27$. Here is what they typed.
Which GELU is it? Put the exact one in its place.
""",
    hints=(
        "The tanh approximation is never further away than 0.00047. This is another "
        "function of the chapter.",
        r"$x$ times the area under the bell curve to its left. Which function of torch "
        r"gives that area, and what is divided by $\sqrt 2$?",
    ),
    proves="Each number is weighed by the normal distribution's area to its left, to "
    "five digits, where no approximation stays.",
    atol=1e-6,
    rtol=1e-5,
    why="It was the quick GELU, whose gate is as near to Φ as a sigmoid comes. The "
    "tanh with its two constants is more than 40 times closer.",
)
def exact_gelu(x):
    """(...) -> (...), number by number."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@exact_gelu.broken(
    "quick GELU",
    because="it is in the list of GELUs, it has the same shape, and some models were "
    "trained with it; in a configuration `gelu` means the exact one",
    section="Where 0.7979 and 0.044715 come from",
)
def _(x):
    return x * torch.sigmoid(1.702 * x)


@exact_gelu.cases
def _(draw):
    yield (torch.tensor([-1.0, 0.0, 1.0, 2.7]),)
    yield (torch.linspace(-6, 6, 49),)
    yield (3 * draw.normal(2, 3, 4),)


@exact_gelu.also("a loop of plain Python")
def _(x):
    values = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.flatten().tolist()]
    return torch.tensor(values).reshape(x.shape)


@exact_gelu.also("torch.nn.functional")
def _(x):
    return torch.nn.functional.gelu(x)


@exact_gelu.also("the normal distribution")
def _(x):
    return x * torch.special.ndtr(x)


@exact_gelu.mistake(
    "tanh GELU",
    because="it is so close that one takes it for the same; 0.00047 is far more than "
    "float32 rounds away",
    section="Where 0.7979 and 0.044715 come from",
)
def _(x):
    inner = math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


@exact_gelu.mistake(
    "SiLU",
    because="its curve has the same form, a gate times x; but its gate is the logistic "
    "curve, and it dips deeper",
    section="SiLU, and the dip",
)
def _(x):
    return x * torch.sigmoid(x)


@exact_gelu.mistake(
    "the gate alone",
    because="Φ(x) is the whole calculation, and one forgets that it is there to "
    "weigh x",
)
def _(x):
    return torch.special.ndtr(x)


@exact_gelu.mistake(
    "erf without the root of two",
    because="erf is called an integral of the bell curve; its curve is exp(-t²), not "
    "exp(-z²/2), so z is √2 times t",
)
def _(x):
    return x * 0.5 * (1 + torch.erf(x))


@exact_gelu.mistake(
    "divided by two",
    because="z²/2 looks as if z were halved; a square under a half means a root of two",
)
def _(x):
    return x * 0.5 * (1 + torch.erf(x / 2))


@exact_gelu.mistake(
    "the half forgotten",
    because="1 + erf looks like a probability already; it runs from 0 to 2",
)
def _(x):
    return x * (1 + torch.erf(x / math.sqrt(2)))


@exact_gelu.mistake(
    "the bell curve's height",
    because="φ and Φ are one letter; the gate is the area to the left, not the height",
)
def _(x):
    return x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@exact_gelu.mistake(
    "the area to the right",
    because="half of erfc is a probability of the normal distribution too, that of "
    "lying above x; but a large x must pass, not be stopped",
)
def _(x):
    return x * 0.5 * torch.erfc(x / math.sqrt(2))
