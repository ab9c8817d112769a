"""Exercises on LayerNorm and RMSNorm."""

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/03_norms", "Norms")


@chapter.implement(
    title="RMSNorm",
    minutes=10,
    difficulty="easy",
    section="LayerNorm, one number at a time",
    text=r"""
Write `rms_norm`, without looking it up: each token's vector is divided by its root mean
square, $\epsilon$ inside the root, and multiplied by the gain. Tokens and gain may come
in half precision. The result has their dtype, and no square may overflow on the way.
""",
    hints=(
        "The name, read backwards, is the recipe: square, mean, root. Along which "
        "axis, and where does $\\epsilon$ come in?",
        "The last axis, with `keepdim`. In float16 the square of 256 is infinite "
        "already: go to float32 before you square, and come back before you return.",
    ),
    proves="Each token is brought to root mean square one by itself, tiny ones as "
    "far as epsilon lets them; no square of half precision overflows, and what comes "
    "back has the dtype of the tokens.",
    rtol=2e-3,
    why="Whether the gain multiplies before or after the cast is Gemma's way or "
    "Llama's; they differ in a last bit of half precision, and both pass.",
)
def rms_norm(x, weight, eps):
    """(B, T, D), gain (D,), a float -> (B, T, D) in the dtype of x."""
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps)).type_as(x)


@rms_norm.cases
def _(draw):
    # root mean squares 5 and 13
    yield torch.tensor([[[1.0, 7.0], [7.0, 17.0]]]), torch.tensor([1.0, 0.5]), 0.0
    # a mean square of 0.0025 and an epsilon of 0.0075 make 0.01, the square of 0.1
    x = torch.tensor([[[0.01, 0.07], [0.07, -0.01], [0.0, 0.0]]])
    yield x, torch.tensor([1.0, 0.5]), 0.0075
    for size, eps in ((0.01, 1e-4), (0.05, 1e-5), (30.0, 1e-5)):
        x = size * (draw.normal(2, 3, 5) + 0.3)
        yield x, draw.uniform(5, low=0.5, high=1.5), eps
    x = 300 * draw.normal(2, 4, 6)
    x[..., 1] = 300.0  # 300 squared is no float16
    yield x.half(), draw.uniform(6, low=0.5, high=1.5).half(), 1e-5


@rms_norm.also("loops")
def _(x, weight, eps):
    out = torch.empty_like(x)
    for b, text in enumerate(x.tolist()):
        for t, token in enumerate(text):
            mean_square = sum(value**2 for value in token) / len(token)
            for d, value in enumerate(token):
                out[b, t, d] = value / (mean_square + eps) ** 0.5 * weight[d].item()
    return out


@rms_norm.also("torch.nn.functional, the gain multiplied before the cast")
def _(x, weight, eps):
    normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return normed.to(x.dtype)


@rms_norm.also("the length of the vector")
def _(x, weight, eps):
    wide = x.double()
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    return (wide / (square + eps).sqrt()).to(x.dtype) * weight


@rms_norm.also("the package's class")
def _(x, weight, eps):
    from annotated_src.norms import RMSNorm

    norm = RMSNorm(len(weight), eps).requires_grad_(False)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


@rms_norm.mistake(
    "the square of the mean",
    because="root mean square is read from left to right; the squares come first, then "
    "their mean, and only so can signs not cancel",
)
def _(x, weight, eps):
    wide = x.float()
    square_of_mean = wide.mean(dim=-1, keepdim=True).square()
    return weight * (wide * torch.rsqrt(square_of_mean + eps)).type_as(x)


@rms_norm.mistake(
    "sum for mean",
    because="to normalise a vector is to divide by its length, elsewhere. The result "
    "has length 1 then, here it has length √D",
    section="What a norm does to space",
)
def _(x, weight, eps):
    wide = x.float()
    square = wide.square().sum(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(square + eps)).type_as(x)


@rms_norm.mistake(
    "epsilon outside the root",
    because="it keeps a division from failing, so it is added to what one divides "
    "by; the paper's own code does so",
    section="Epsilon: inside or outside",
)
def _(x, weight, eps):
    wide = x.float()
    root = wide.square().mean(dim=-1, keepdim=True).sqrt()
    return weight * (wide / (root + eps)).type_as(x)


@rms_norm.mistake(
    "epsilon fixed at 1e-6",
    because="many models have this very number, and where vectors are large no test "
    "can tell; each model's configuration says which it is",
    section="Epsilon: inside or outside",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + 1e-6)).type_as(x)


@rms_norm.mistake(
    "no cast to float32",
    because="every step exists in float16, nothing fails, and with numbers around "
    "one the result is right",
    section="What half precision does to a square",
)
def _(x, weight, eps):
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return weight * (x * torch.rsqrt(mean_square + eps))


@rms_norm.mistake(
    "no way back",
    because="float32 is more exact, so it seems a gift to the next layer. But that "
    "one has weights in half precision, and refuses it",
    section="The ladder of equality",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps))


@rms_norm.mistake(
    "over the tokens",
    because="the middle axis is the long one, and in a batch norm numbers of different "
    "samples are averaged; here no token may know of another",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps)).type_as(x)


@rms_norm.mistake(
    "one size for everything",
    because="`mean()` without an axis runs, and with a single token it is right",
)
def _(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean() + eps)).type_as(x)


@rms_norm.mistake(
    "no keepdim",
    because="means broadcast by themselves, one thinks. They line up with the last "
    "axis, and where T equals D nothing complains",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1)
    return weight * (wide * torch.rsqrt(mean_square + eps)).type_as(x)


@rms_norm.mistake(
    "the mean taken off first",
    because="that is what LayerNorm does, and on vectors of mean zero the two agree",
    section="What a norm does to space",
)
def _(x, weight, eps):
    wide = x.float() - x.float().mean(dim=-1, keepdim=True)
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps)).type_as(x)


@rms_norm.mistake(
    "the root forgotten",
    because="`mean_square` is at hand, and vectors of size one do not notice",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return weight * (wide / (mean_square + eps)).type_as(x)


@rms_norm.mistake(
    "gain 1 + w",
    because="Gemma stores its gain minus one, so that zeros mean no change; Llama "
    "stores the gain",
    section="Multiply, then cast; or cast, then multiply",
)
def _(x, weight, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (1 + weight) * (wide * torch.rsqrt(mean_square + eps)).type_as(x)


@chapter.implement(
    title="nothing but float16",
    minutes=15,
    difficulty="hard",
    section="What each norm forgets",
    text=r"""
Suppose a device has float16 and nothing else. Write `rms_norm_in_half`, which needs no
other type and still works for vectors of size 5000, of size 0.0003, and for a vector of
zeros, to within one per cent. (All of torch is at your disposal; the point is to need
no wider type.)
""",
    hints=(
        r"A norm forgets the scale: $\operatorname{RMSNorm}_{\epsilon}(a x) = "
        r"\operatorname{RMSNorm}_{\epsilon/a^2}(x)$. So you may choose the scale "
        r"yourself.",
        "Divide each vector by its largest number, without regard to sign: then no "
        "square exceeds 1. What happens to epsilon, and what if the largest number "
        "is 0?",
    ),
    proves="Vectors as large as 5000 and as small as 0.0003 come out as RMSNorm would "
    "have them, each by its own scale, with epsilon where it matters, and zeros stay "
    "zeros.",
    rtol=1e-2,
    atol=1e-3,
)
def rms_norm_in_half(x, weight, eps):
    """(B, T, D) and (D,) in float16, a float -> (B, T, D) in float16."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4)
    small = x / largest  # all between -1 and 1, so no square overflows
    mean_square = small.square().mean(dim=-1, keepdim=True)
    return weight * (small * torch.rsqrt(mean_square + eps / largest / largest))


@rms_norm_in_half.cases
def _(draw):
    def case(x, eps):
        return x.half(), draw.uniform(x.shape[-1], low=0.5, high=1.5).half(), eps

    yield case(torch.tensor([[[300.0, -400.0]]]), 1e-5)
    yield case(torch.zeros(1, 1, 3), 1e-5)
    yield case(-500 * draw.uniform(2, 1, 4, low=0.5), 1e-5)
    sizes = torch.tensor([[0.01, 1.0], [100.0, 5000.0]])[..., None]
    x = sizes * draw.uniform(2, 2, 32, low=-2.0, high=2.0)
    x[..., 3] = 0
    yield case(x, 1e-5)
    tiny = 1e-4 * draw.uniform(1, 2, 8, low=2.0, high=4.0)
    yield case(tiny, 1e-5)
    yield case(tiny, 0.0)


@rms_norm_in_half.also("a loop, and powers of two")
def _(x, weight, eps):
    rows = []
    for row in x.flatten(0, 1):
        scale = 1.0
        while (row.abs() * scale).max() > 1:
            scale /= 2
        while 0 < (row.abs() * scale).max() < 0.5:
            scale *= 2
        small = row * scale
        rows.append(small * (small.square().mean() + eps * scale**2).rsqrt() * weight)
    return torch.stack(rows).reshape(x.shape)


@rms_norm_in_half.also("two fixed scales")
def _(x, weight, eps):
    small = x / 64
    mean_square = (small / 16).square().mean(dim=-1, keepdim=True)
    tiny = (x * 16).square().mean(dim=-1, keepdim=True)
    large = weight * (small / 16 * torch.rsqrt(mean_square + eps / 2**20))
    little = weight * (x * 16 * torch.rsqrt(tiny + eps * 2**8))
    return torch.where(x.abs().amax(dim=-1, keepdim=True) > 12, large, little)


@rms_norm_in_half.mistake(
    "the square overflows",
    because="it is the formula, and with numbers around one it works",
    section="What half precision does to a square",
)
def _(x, weight, eps):
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return weight * (x * torch.rsqrt(mean_square + eps))


def scaled_norm(largest, new_eps, back=lambda out, largest: out):
    """Make a norm that divides by `largest` first, in one of several ways."""

    def norm(x, weight, eps):
        scale = largest(x)
        small = x / scale
        mean_square = small.square().mean(dim=-1, keepdim=True)
        normed = small * torch.rsqrt(mean_square + new_eps(eps, scale))
        return weight * back(normed, scale)

    return norm


def largest_of(x):
    """Give each row's largest number, without regard to sign: (B, T, 1)."""
    return x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4)


def over_square(eps, scale):
    """Divide epsilon by the square of a scale, step by step."""
    return eps / scale / scale


rms_norm_in_half.mistake(
    "epsilon left as it was",
    because="the norm forgets the scale, one has read; with epsilon it does so only "
    "for large vectors",
)(scaled_norm(largest_of, lambda eps, scale: eps))
rms_norm_in_half.mistake(
    "epsilon divided once",
    because="all was divided by the scale, so epsilon is, too; but it stands beside a "
    "square",
)(scaled_norm(largest_of, lambda eps, scale: eps / scale))
rms_norm_in_half.mistake(
    "the scale squared",
    because="epsilon over the square is what the equation says; but in float16 the "
    "square of 0.0003 has one digit left, and one over it is infinite. Dividing twice "
    "is safe",
    section="What half precision does to a square",
)(scaled_norm(largest_of, lambda eps, scale: eps / (scale * scale)))
rms_norm_in_half.mistake(
    "one scale for the whole batch",
    because="`max()` without an axis keeps everything below one; small vectors next "
    "to a large one are squared away to zero",
)(
    scaled_norm(
        lambda x: x.abs().max().reshape(1, 1, 1).clamp_min(1e-4),
        over_square,
    )
)
rms_norm_in_half.mistake(
    "the largest, sign and all",
    because="the maximum is read as the largest in size; a vector's largest number "
    "may be a negative one",
)(
    scaled_norm(
        lambda x: x.amax(dim=-1, keepdim=True).clamp_min(1e-4),
        over_square,
    )
)
rms_norm_in_half.mistake(
    "zero by zero",
    because="no token is all zeros, one thinks; padding is, and 0/0 is not a number",
    section="Epsilon: inside or outside",
)(scaled_norm(lambda x: x.abs().amax(dim=-1, keepdim=True), over_square))
rms_norm_in_half.mistake(
    "scaled back at the end",
    because="what was divided must be multiplied again, as for a softmax of scaled "
    "scores or an int8 product; a norm has forgotten the scale by then",
)(scaled_norm(largest_of, over_square, lambda out, largest: out * largest))


@chapter.implement(
    title="a gain followed by a matrix",
    minutes=10,
    difficulty="moderate",
    section="LayerNorm, one number at a time",
    text=r"""
A norm is followed by a linear layer, and two linear maps are one. Write `fold_norm`:
given a LayerNorm's gain $\gamma$ and shift $\beta$ and the layer's $W$ and $b$, return
the weight and bias that give the same when the norm before them has gain 1 and shift 0.
""",
    hints=(
        r"Write out $W(\gamma \odot n + \beta) + b$ and collect what multiplies $n$.",
        r"$\gamma_i$ goes with feature $i$ of the *input*. Is that a row of $W$ or a "
        r"column? And through which matrix does $\beta$ go?",
    ),
    proves="The plain norm followed by the new layer gives what the norm followed by "
    "the old layer gave, whatever the gains, shifts and widths.",
    why="An RMSNorm has no shift: there the gain moves into the matrix, and the bias "
    "stays. Some converters fold norms away like this.",
)
def fold_norm(gain, shift, weight, bias):
    """(D,), (D,), (out, D), (out,) -> a new weight (out, D) and bias (out,)."""
    return weight * gain, weight @ shift + bias


@fold_norm.cases
def _(draw):
    yield (
        torch.tensor([2.0, 3.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([[1.0, 1.0], [0.0, 2.0]]),
        torch.tensor([5.0, 6.0]),
    )
    for width, out in ((3, 3), (4, 6), (5, 2)):
        gain = draw.uniform(width, low=-1.5, high=1.5)
        yield gain, draw.normal(width), draw.normal(out, width), draw.normal(out)


@fold_norm.also("loops")
def _(gain, shift, weight, bias):
    folded, constant = torch.zeros_like(weight), bias.clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            folded[row, column] = weight[row, column] * gain[column]
            constant[row] += weight[row, column] * shift[column]
    return folded, constant


@fold_norm.also("asking the layer")
def _(gain, shift, weight, bias):
    def layer(normed):
        return torch.nn.functional.linear(normed * gain + shift, weight, bias)

    constant = layer(torch.zeros_like(gain))
    return (layer(torch.eye(len(gain))) - constant).T, constant


@fold_norm.also("diagonal matrices")
def _(gain, shift, weight, bias):
    return weight @ torch.diag(gain), torch.einsum("od,d->o", weight, shift) + bias


@fold_norm.mistake(
    "rows scaled for columns",
    because="`weight` looks like the matrix that is applied, and its first axis like "
    "the features that come in; torch keeps (out, in)",
)
def _(gain, shift, weight, bias):
    return weight * gain[:, None], weight @ shift + bias


@fold_norm.mistake(
    "the shift through the folded matrix",
    because="the new weight has the old name by then; but the shift is added after "
    "the gain, and must not be multiplied by it",
)
def _(gain, shift, weight, bias):
    weight = weight * gain
    return weight, weight @ shift + bias


@fold_norm.mistake(
    "the shift added as it is",
    because="a bias and a bias make a bias. But one stands before the matrix, the "
    "other after it",
)
def _(gain, shift, weight, bias):
    return weight * gain, shift + bias


@fold_norm.mistake(
    "the shift forgotten",
    because="Llama's norm has none, and nothing of it can be seen in the weight's "
    "shape",
    section="The source",
)
def _(gain, shift, weight, bias):
    return weight * gain, bias


@fold_norm.mistake(
    "the bias scaled too",
    because="the gain is folded into the layer, and the bias is part of the layer; "
    "but it is added after the matrix, where the gain has done its work",
)
def _(gain, shift, weight, bias):
    return weight * gain, weight @ shift + bias * gain


@fold_norm.mistake(
    "divided by the gain",
    because="the gain is taken away from the norm, and taking away sounds like "
    "dividing; the layer must do what the norm no longer does",
)
def _(gain, shift, weight, bias):
    return weight / gain, weight @ shift + bias


@fold_norm.mistake(
    "the transposed matrix",
    because="on paper features stand in columns, and `x @ weight.T` has a transpose "
    "in it already; the shift needs the matrix itself",
)
def _(gain, shift, weight, bias):
    return weight * gain, shift @ weight + bias


chapter.explain(
    "norm_of_two_numbers",
    title="a norm that knows three answers",
    minutes=5,
    difficulty="moderate",
    section="What a norm does to space",
    text=r"""
A student tests a LayerNorm (gain 1, bias 0) with vectors of width 2, and finds that it
only ever returns $(1, -1)$, $(-1, 1)$ or zeros, up to $\epsilon$. Is it broken, and
would RMSNorm do the same?
""",
    hints=(
        r"Which vectors of two numbers have mean zero? And which of these lie on the "
        r"sphere of radius $\sqrt 2$?",
        "Subtracting the mean leaves a line. A line meets a circle in two points.",
    ),
    choices={
        "a": Choice(
            "It is right. RMSNorm would return points of a whole circle.",
            r"Vectors of mean zero form a line here, and the circle of radius $\sqrt "
            r"2$ meets it in two points; equal numbers project to zero. All that is "
            r"left is which number is larger. RMSNorm keeps the direction of $x$.",
        ),
        "b": Choice(
            "It is broken: it should return many values, of variance 1.",
            "It returns all there are. Two numbers of mean 0 and variance 1 can only "
            "be $1$ and $-1$, in one order or the other.",
        ),
        "c": Choice(
            "It is right, and RMSNorm does the same.",
            "RMSNorm does not subtract the mean, so it never leaves the plane for the "
            r"line: $(1, 7)$ becomes $(0.2, 1.4)$, and $(7, 1)$ something else again.",
        ),
        "d": Choice(
            "It is broken: ε is so large that it hides the differences.",
            r"A large $\epsilon$ makes the output smaller than $(1, -1)$, and "
            r"different for different inputs. With a small one only the sign is left.",
        ),
    },
    right="a",
)


@chapter.debug(
    title="a loss that is too good",
    minutes=10,
    difficulty="moderate",
    section="LayerNorm, one number at a time",
    text="""
A colleague writes the LayerNorm below. It runs, shapes are right, training loss is
*lower* than yours, and generated text is nonsense. Mend it.
""",
    hints=(
        "Change the last token of a text. Which tokens of the output may change?",
        "`dim=1` of a tensor of shape (B, T, D) is not the axis of the features.",
    ),
    proves="Each token is normed by itself, by the variance of its own D numbers, in "
    "float32 inside and in its own dtype outside.",
    rtol=2e-3,
    why="`dim=1` averages over the tokens, later ones included. In training the norm "
    "of a token leaks what comes after it, and the loss is too good; in generation "
    "nothing comes after it, and the leak is gone. A test that changes only the last "
    "token finds it: the tokens before must not notice.",
)
def layer_norm(x, weight, bias, eps):
    """(B, T, D), gain (D,), shift (D,), a float -> (B, T, D) in x's dtype."""
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    unit = centred * torch.rsqrt(variance + eps)
    return (unit * weight + bias).type_as(x)


@layer_norm.broken(
    "over the tokens",
    because="the tokens stand in axis 1, each of them is to be normed, and `dim` is "
    "taken for the axis that stays. It is the axis that is averaged away",
)
def _(x, weight, bias, eps):
    wide = x.float()
    centred = wide - wide.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    unit = centred * torch.rsqrt(variance + eps)
    return (unit * weight + bias).type_as(x)


@layer_norm.cases
def _(draw):
    # deviations -2, 2 and -5, 5
    yield (
        torch.tensor([[[1.0, 5.0], [3.0, 13.0]]]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([0.0, 10.0]),
        0.0,
    )
    for size, eps in ((0.01, 1e-4), (1.0, 1e-5), (30.0, 1e-5)):
        x = size * (draw.normal(2, 3, 5) + 0.7)
        yield x, draw.uniform(5, low=0.5, high=1.5), draw.normal(5), eps
    x = 300 * draw.normal(2, 4, 6)
    x[..., 1], x[..., 2] = 600.0, -600.0
    yield x.half(), draw.uniform(6, low=0.5, high=1.5), 3 + draw.uniform(6), 1e-5


@layer_norm.also("torch.nn.functional")
def _(x, weight, bias, eps):
    normed = torch.nn.functional.layer_norm(
        x.double(), x.shape[-1:], weight.double(), bias.double(), eps
    )
    return normed.to(x.dtype)


@layer_norm.also("loops")
def _(x, weight, bias, eps):
    out = torch.empty_like(x)
    for b, text in enumerate(x.tolist()):
        for t, token in enumerate(text):
            mean = sum(token) / len(token)
            variance = sum((value - mean) ** 2 for value in token) / len(token)
            unit = [(value - mean) / (variance + eps) ** 0.5 for value in token]
            out[b, t] = torch.tensor(unit) * weight + bias
    return out


@layer_norm.mistake(
    "over the whole text",
    because="the layer's name says layer, and a layer's output is all of it; each "
    "token has its own mean and variance",
)
def _(x, weight, bias, eps):
    wide = x.float()
    centred = wide - wide.mean(dim=(1, 2), keepdim=True)
    variance = centred.square().mean(dim=(1, 2), keepdim=True)
    return (centred * torch.rsqrt(variance + eps) * weight + bias).type_as(x)


@layer_norm.mistake(
    "D − 1 for D",
    because="`var` and `std` of torch divide by D − 1 unless told otherwise, as one "
    "does for a sample; in wide vectors it does not show",
)
def _(x, weight, bias, eps):
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = wide.var(dim=-1, keepdim=True)
    return (centred * torch.rsqrt(variance + eps) * weight + bias).type_as(x)


@layer_norm.mistake(
    "epsilon outside the root",
    because="it keeps a division from failing, so it is added to what one divides by",
    section="Epsilon: inside or outside",
)
def _(x, weight, bias, eps):
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    deviation = wide.std(dim=-1, keepdim=True, correction=0)
    return (centred / (deviation + eps) * weight + bias).type_as(x)


@layer_norm.mistake(
    "the mean left where it is",
    because="RMSNorm does without it; where the mean is small, as in many hidden "
    "states, the two hardly differ",
    section="What a norm does to space",
)
def _(x, weight, bias, eps):
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight + bias).type_as(x)


@layer_norm.mistake(
    "the mean taken off the variance only",
    because="the variance has the mean in it already, and one forgets that what is "
    "divided must be centred as well",
)
def _(x, weight, bias, eps):
    wide = x.float()
    variance = wide.var(dim=-1, keepdim=True, correction=0)
    return (wide * torch.rsqrt(variance + eps) * weight + bias).type_as(x)


@layer_norm.mistake(
    "the shift multiplied too",
    because="gain and shift are learned together, and brackets are cheap; the shift "
    "comes after the gain",
)
def _(x, weight, bias, eps):
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return ((centred * torch.rsqrt(variance + eps) + bias) * weight).type_as(x)


@layer_norm.mistake(
    "no cast to float32",
    because="every step exists in float16, nothing fails, and with numbers around "
    "one the result is right",
    section="What half precision does to a square",
)
def _(x, weight, bias, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred * torch.rsqrt(variance + eps) * weight + bias).type_as(x)
