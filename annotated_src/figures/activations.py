"""Figures of the chapter on activations: bends, constants, layers that multiply."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor
from torch.nn import functional as F

from annotated_src.activations import GELU_CUBIC, gelu_exact, gelu_tanh, silu
from annotated_src.feed_forward import FeedForward, GatedFeedForward
from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    GREY_INK,
    INK,
    ORANGE,
    BookFigure,
    panels,
)

TAYLOR_CUBIC = (4 - math.pi) / (6 * math.pi)  # matches the third derivative at 0
MANTISSA = {"bfloat16": 7, "float16": 10}  # bits after the leading one
LOWEST_EXPONENT = {"bfloat16": -126, "float16": -14}  # of a normal number
LEVELS = (-12, -8, -4, -2, -1, 0, 1, 2, 4, 8, 12)
DIVERGING = LinearSegmentedColormap.from_list("gate", (ORANGE, "#FFFFFF", BLUE))


class BendData(NamedTuple):
    """Values and slopes of ReLU, GELU and SiLU, and where the last two are lowest."""

    x: Tensor  # (X,)
    values: dict[str, Tensor]  # name to (X,)
    slopes: dict[str, Tensor]
    lowest: dict[str, tuple[float, float]]  # name to (x, value)


class ConstantData(NamedTuple):
    """How far the tanh gate is from Phi, and what 16 bits can see of it."""

    x: Tensor  # (X,) from 0 up
    gate_errors: dict[float, Tensor]  # cubic constant to (X,), tanh gate - Phi
    peak: float  # the largest gate error with GELU_CUBIC
    wide: Tensor  # (W,) both signs
    gelu_error: Tensor  # (W,) |gelu_tanh - gelu_exact|
    half_steps: dict[str, Tensor]  # dtype to (W,), the most that rounding can move GELU


class ProductData(NamedTuple):
    """What units and layers make of two inputs; rows are y, columns are x."""

    axis: Tensor  # (X,)
    plain_unit: Tensor  # (X, X) silu(x)
    gated_unit: Tensor  # (X, X) silu(x) * y
    plain_layer: Tensor  # (X, X) four units
    gated_layer: Tensor  # (X, X) two units


def tanh_gate(x: Tensor, cubic: float) -> Tensor:
    """Approximate Phi as `gelu_tanh` does, with any constant before the cube."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + cubic * x**3)))


def gated_product() -> GatedFeedForward:
    """Set two gated units by hand: (x, y) becomes (xy, 0), for all x and y."""
    layer = GatedFeedForward(2, 2, silu).double().requires_grad_(False)
    layer.gate_proj.weight.copy_(torch.tensor([[1, 0], [-1, 0]]))  # x, -x
    layer.up_proj.weight.copy_(torch.tensor([[0, 1], [0, 1]]))  # y, y
    layer.down_proj.weight.copy_(torch.tensor([[1, -1], [0, 0]]))  # first - second
    return layer


def plain_product(scale: float = 1.0) -> FeedForward:
    """Set four plain units by hand: (x, y) becomes about (xy, 0), while both are small.

    A smaller scale widens the region, and subtracts nearly equal numbers.
    """
    layer = FeedForward(2, 4, silu).double().requires_grad_(False)
    directions = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1]])
    layer.up_proj.weight.copy_(scale * directions)
    layer.up_proj.bias.zero_()
    layer.down_proj.weight.copy_(torch.tensor([[1, 1, -1, -1], [0, 0, 0, 0]]))
    layer.down_proj.weight.div_(2 * scale**2)
    layer.down_proj.bias.zero_()
    return layer


def bend_data() -> BendData:
    """Evaluate the three on one grid from -6 to 6; autograd gives the slopes."""
    x = torch.linspace(-6, 6, 12_001, dtype=torch.float64)
    functions = {"ReLU": F.relu, "GELU": gelu_exact, "SiLU": silu}
    values = {name: f(x) for name, f in functions.items()}
    slopes = {name: _slope(f, x) for name, f in functions.items()}
    lowest = {}
    for name in ("GELU", "SiLU"):
        at = int(values[name].argmin())
        lowest[name] = (x[at].item(), values[name][at].item())
    return BendData(x, values, slopes, lowest)


def constant_data() -> ConstantData:
    """Compare the Taylor constant with the paper's, and the error with 16-bit steps."""
    x = torch.linspace(0, 5, 5001, dtype=torch.float64)
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    errors = {c: tanh_gate(x, c) - cdf for c in (GELU_CUBIC, TAYLOR_CUBIC)}
    wide = torch.linspace(-4.5, 4.5, 1802, dtype=torch.float64)  # steps over 0
    exact = gelu_exact(wide)
    steps = {}
    for name, bits in MANTISSA.items():
        exponent = exact.abs().log2().floor().clamp(min=LOWEST_EXPONENT[name])
        steps[name] = 2.0 ** (exponent - bits - 1)
    return ConstantData(
        x,
        errors,
        errors[GELU_CUBIC].abs().max().item(),
        wide,
        (gelu_tanh(wide) - exact).abs(),
        steps,
    )


def product_data() -> ProductData:
    """Feed every pair (x, y) from -4 to 4 to one unit of each kind, and to a layer."""
    axis = torch.linspace(-4, 4, 201, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pairs = torch.stack((x, y), dim=-1)
    return ProductData(
        axis,
        silu(x),
        silu(x) * y,
        plain_product()(pairs)[..., 0],
        gated_product()(pairs)[..., 0],
    )


def draw_bend(data: BendData) -> BookFigure:
    """Draw the curves near the bend, and their slopes."""
    figure, (left, right) = panels(1, 2, height=3.9)
    colours = {"ReLU": GREY_INK, "SiLU": ORANGE, "GELU": BLUE}
    for name, colour in colours.items():
        left.plot(data.x, data.values[name], color=colour)
        right.plot(data.x, data.slopes[name], color=colour)
    for name, at in (("GELU", (-0.3, -0.42)), ("SiLU", (-4.75, -0.42))):
        x, value = data.lowest[name]
        words = f"{name}, lowest at\n({x:.2f}, {value:.2f})".replace("-", "−")
        left.plot(x, value, "o", color=colours[name], markersize=6)
        left.annotate(
            words,
            (x, value),
            at,
            color=colours[name],
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "shrinkB": 4},
        )
    left.text(-3.2, 0.03, "ReLU", color=GREY_INK)
    left.set(
        xlim=(-5, 1.6), ylim=(-0.55, 1.5), xlabel="x", title="Value: a dip below 0"
    )
    right.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    right.text(1.5, 1.15, "GELU", color=BLUE, ha="center")
    right.text(3.6, 1.11, "SiLU", color=ORANGE, ha="center")
    right.text(0.12, 0.04, "ReLU jumps at 0", color=GREY_INK)
    right.set(
        xlim=(-5, 5), ylim=(-0.2, 1.27), xlabel="x", title="Slope: under 0, over 1"
    )
    for ax in (left, right):
        ax.axhline(0, color=INK, linewidth=0.6)
    return figure


def draw_constant(data: ConstantData) -> BookFigure:
    """Draw the error of the gate, and the error of GELU over the 16-bit steps."""
    figure, (left, right) = panels(1, 2, height=3.9)
    fitted, taylor = (data.gate_errors[c] * 1e4 for c in (GELU_CUBIC, TAYLOR_CUBIC))
    peak = data.peak * 1e4
    left.axhspan(-peak, peak, color=BLUE, alpha=0.07, linewidth=0)
    left.axhline(0, color=INK, linewidth=0.6)
    left.plot(data.x, taylor, color=ORANGE, linestyle="--")
    left.plot(data.x, fitted, color=BLUE)
    left.text(2.85, 2.75, f"Taylor: {TAYLOR_CUBIC:.5f}", color=ORANGE)
    left.text(2.5, -1.15, f"paper: {GELU_CUBIC}", color=BLUE)
    left.text(0.07, peak + 0.08, f"+{peak:.2f}", color=BLUE)
    left.text(0.07, -peak - 0.1, f"−{peak:.2f}", color=BLUE, va="top")
    left.set(
        xlim=(0, 5),
        ylim=(-2.3, 3.5),
        xlabel="x",
        title="tanh gate − Φ, in units of 0.0001",
    )
    right.semilogy(data.wide, data.half_steps["bfloat16"], color=GREY_INK)
    right.semilogy(data.wide, data.half_steps["float16"], color=GREEN)
    right.semilogy(data.wide, data.gelu_error, color=BLUE)
    right.text(3.9, 1.15e-2, "half a step of bfloat16", color=GREY_INK, ha="right")
    right.text(3.9, 1.2e-3, "of float16", color=GREEN, ha="right")
    right.text(-2.6, 7e-4, "tanh − exact", color=BLUE, ha="center", va="bottom")
    right.set(
        xlim=(-4.5, 4.5), ylim=(1e-8, 4e-2), xlabel="x", title="Can 16 bits see it?"
    )
    return figure


def draw_product(data: ProductData) -> BookFigure:
    """Draw four maps over (x, y): a unit and a layer, plain and gated."""
    figure, axes = panels(2, 2, height=7.3, sharex=True, sharey=True)
    titles = (
        "One plain unit, silu(x): stripes",
        "One gated unit, silu(x) · y",
        "Four plain units: xy, but only near 0",
        "Two gated units: xy, exactly",
    )
    for ax, title, values in zip(axes, titles, data[1:], strict=True):
        _map(ax, data.axis, values)
        ax.set_title(title)
    for ax in axes[2:]:
        ax.set_xlabel("x")
    for ax in axes[::2]:
        ax.set_ylabel("y", rotation=0)
    return figure


def _map(ax: Axes, axis: Tensor, values: Tensor) -> None:
    ax.imshow(
        values.numpy(),
        cmap=DIVERGING,
        vmin=-16,
        vmax=16,
        origin="lower",
        extent=(-4, 4, -4, 4),
        interpolation="bilinear",
    )
    ax.contour(axis, axis, values, levels=LEVELS, colors=INK, linewidths=1.1)
    for rising in (True, False):  # a label where a line crosses a diagonal
        diagonal = values.diagonal() if rising else values.flip(0).diagonal()
        for level in LEVELS:
            at = ((diagonal[:-1] < level) != (diagonal[1:] < level)).nonzero()
            for i in at.flatten().tolist() if level else ():
                x = axis[i].item()
                ax.text(
                    x,
                    x if rising else -x,
                    f"{level:+d}".replace("-", "−"),
                    ha="center",
                    va="center",
                    bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.8, "lw": 0},
                )
    ax.set_aspect("equal")
    ax.set_xticks((-4, -2, 0, 2, 4))
    ax.set_yticks((-4, -2, 0, 2, 4))


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    return slope
