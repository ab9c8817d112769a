"""What a norm does to a vector, and what half precision does to a norm."""

import math
from typing import NamedTuple

import torch
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn import functional as F

from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    BookFigure,
    panels,
)
from annotated_src.norms import LayerNorm, RMSNorm

# ---------------------------------------------------------------- geometry


class GeometryData(NamedTuple):
    """Points in the plane spanned by the ones vector and x: (along ones, across)."""

    x: Tensor
    layer_norm: Tensor  # of x, and of every point on its dashed line
    rms_norm: Tensor  # of x
    shifted: Tensor  # x minus the same number everywhere
    rms_norm_shifted: Tensor
    radius: float  # sqrt(D)


def geometry_data(shift: float = 6.0) -> GeometryData:
    """Norm (1, 3, 3, 9), whose mean, standard deviation and RMS are 4, 3 and 5."""
    x = torch.tensor([1.0, 3.0, 3.0, 9.0])
    width = x.numel()
    ones = torch.ones(width) / math.sqrt(width)
    across = F.normalize(x - x.mean(), dim=0)
    plane = torch.stack([ones, across])  # (2, D)
    layer_norm, rms_norm = LayerNorm(width, eps=0.0), RMSNorm(width, eps=0.0)
    with torch.no_grad():
        return GeometryData(
            plane @ x,
            plane @ layer_norm(x),
            plane @ rms_norm(x),
            plane @ (x - shift),
            plane @ rms_norm(x - shift),
            math.sqrt(width),
        )


def draw_geometry(data: GeometryData) -> BookFigure:
    """Draw both norms as ways onto one circle."""
    figure, (ax,) = panels(height=4.8)
    along, across = data.x.tolist()
    left = data.shifted[0].item()
    ax.set_aspect("equal")
    ax.set_xlim(-5.6, 10.6)
    ax.set_ylim(-2.9, 7.9)
    ax.axis("off")
    ax.annotate(
        "", (10.3, 0), (-5.4, 0), arrowprops={"arrowstyle": "->", "color": GREY}
    )
    ax.annotate("", (0, 7.7), (0, -2.6), arrowprops={"arrowstyle": "->", "color": GREY})
    ax.text(10.4, -0.2, "along (1, 1, 1, 1)", ha="right", va="top", color=INK)
    ax.text(0.2, 7.5, "mean zero", va="center", color=INK)
    ax.add_patch(Circle((0, 0), data.radius, fill=False, color=INK, lw=1.5))
    ax.text(1.75, -1.45, r"radius $\sqrt{D}$ = 2", va="top")
    # The triangle.
    ax.plot([0, along], [0, across], color=BLUE, ls="--", lw=1.5)
    ax.plot([left, along], [across, across], color=ORANGE, ls="--", lw=1.5)
    ax.plot([along, along], [0, across], color=GREY, lw=1)
    ax.text(3.4, 6.15, "8 = 2 × mean", ha="center", va="bottom", color=ORANGE)
    ax.text(8.2, 2.9, "6 = 2 × std", va="center")
    ax.text(5.0, 3.45, "10 = 2 × RMS", ha="center", va="top", rotation=36.9, color=BLUE)
    # The tokens and where they land.
    ax.plot(along, across, "o", color=INK, ms=8)
    ax.text(along, across + 0.3, "x = (1, 3, 3, 9)", va="bottom", ha="center")
    ax.plot(left, across, "o", color=INK, ms=8)
    ax.text(left, across + 0.3, "x − 6", va="bottom", ha="center")
    ax.plot([0, left], [0, across], color=BLUE, ls="--", lw=1.5)
    ax.plot(*data.rms_norm.tolist(), "s", color=BLUE, ms=9)
    ax.text(2.1, 1.0, "RMSNorm(x)", color=BLUE, va="center")
    ax.plot(*data.rms_norm_shifted.tolist(), "s", color=BLUE, ms=9)
    ax.text(-1.7, 1.45, "RMSNorm(x − 6)", color=BLUE, ha="right", va="center")
    ax.annotate(
        "",
        (0, data.radius + 0.25),
        (0, across),
        arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2},
    )
    ax.plot(*data.layer_norm.tolist(), "D", color=ORANGE, ms=9)
    ax.text(
        0.25, 3.85, "LayerNorm\nof both", color=ORANGE, va="center", linespacing=1.1
    )
    return figure


# ---------------------------------------------------------------- half precision

HALVES = (torch.float16, torch.bfloat16)


def running_sum(x: Tensor) -> Tensor:
    """Add along the last dimension one by one, rounding to x.dtype at every step."""
    total = torch.zeros_like(x[..., 0])
    totals = []
    for term in x.unbind(-1):
        total = total + term
        totals.append(total)
    return torch.stack(totals, dim=-1)


class StallData(NamedTuple):
    """The running total of ones, after 1, 2, 3, ... of them."""

    float32: Tensor
    float16: Tensor
    bfloat16: Tensor


def stall_data(count: int = 4096) -> StallData:
    """Count to `count` in three formats."""
    ones = torch.ones(count)
    return StallData(
        running_sum(ones),
        running_sum(ones.half()).float(),
        running_sum(ones.bfloat16()).float(),
    )


def draw_stall(data: StallData) -> BookFigure:
    """Draw three counts to 4096, two of which get stuck."""
    figure, (ax,) = panels(height=2.9)
    count = data.float32.numel()
    steps = range(1, count + 1)
    lines = (
        (data.float32, GREEN, "float32 counts to"),
        (data.float16, ORANGE, "float16 stops at"),
        (data.bfloat16, BLUE, "bfloat16 stops at"),
    )
    for totals, colour, words in lines:
        ax.plot(steps, totals, color=colour)
        last = int(totals[-1])
        ax.text(count + 60, last, f"{words}\n{last}", color=colour, va="center")
    ax.set_xlim(0, count * 1.28)
    ax.set_xticks([0, 1024, 2048, 3072, 4096])
    ax.set_yticks([0, 1024, 2048, 3072, 4096])
    ax.set_xlabel("ones added, one at a time")
    ax.set_ylabel("running total")
    return figure


class CliffData(NamedTuple):
    """Relative error of the RMS against the true size of x, for each way to compute it.

    NaN where x itself does not fit the format; inf where the RMS overflowed.
    """

    sizes: Tensor
    all_float16: Tensor
    float16_squares: Tensor  # squares rounded to float16, added in float32
    all_bfloat16: Tensor
    float32_inside: Tensor  # the worse of the two halves as input, float32 in between


def rms_error(x: Tensor, squares: torch.dtype, sums: torch.dtype) -> Tensor:
    """Compare the RMS of x, computed in these formats, with the one in float64."""
    exact = x.double().square().mean(dim=-1).sqrt()
    terms = x.to(squares).square().to(sums)
    total = terms.sum(dim=-1) if sums == torch.float32 else running_sum(terms)[..., -1]
    rms = (total / x.shape[-1]).sqrt().double()
    return (rms / exact - 1).abs()


def cliff_data(width: int = 4096, points: int = 221, draws: int = 9) -> CliffData:
    """Scale random vectors from 1e-6 to 1e5; the median error of each way."""
    x = torch.randn(draws, 1, width, generator=torch.Generator().manual_seed(0))
    unit = x / x.square().mean(dim=-1, keepdim=True).sqrt()
    sizes = torch.logspace(-6, 5, points)
    half, brain = ((sizes[:, None] * unit).to(dtype) for dtype in HALVES)
    fits = half.isfinite().all(dim=-1).all(dim=0)

    def median(x: Tensor, squares: torch.dtype, sums: torch.dtype) -> Tensor:
        errors = rms_error(x, squares, sums).median(dim=0).values
        return errors if x is brain else errors.masked_fill(~fits, torch.nan)

    return CliffData(
        sizes,
        median(half, torch.float16, torch.float16),
        median(half, torch.float16, torch.float32),
        median(brain, torch.bfloat16, torch.bfloat16),
        torch.fmax(
            median(half, torch.float32, torch.float32),
            median(brain, torch.float32, torch.float32),
        ),
    )


INFINITE = 300.0  # where the axis shows an infinite error


def draw_cliffs(data: CliffData, eps: float = 1e-5) -> BookFigure:
    """Draw the error of each way, with the places where float16 falls off."""
    figure, (ax,) = panels(height=4.3)
    ax.axvspan(data.sizes[0].item(), math.sqrt(eps), color=GREY, alpha=0.1, lw=0)
    ax.text(1.4e-6, 4e-6, "ε = 1e-5 outweighs\nthe squares here", va="center")
    for errors, colour, style in (
        (data.float32_inside, GREEN, "-"),
        (data.all_bfloat16, BLUE, "-"),
        (data.float16_squares, ORANGE, ":"),
        (data.all_float16, ORANGE, "-"),
    ):
        shown = errors.clamp(3e-9, INFINITE)
        ax.plot(data.sizes, shown, color=colour, ls=style, solid_joinstyle="round")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(1e-6, 1e5)
    ax.set_ylim(1e-9, INFINITE * 2.5)
    ax.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1, INFINITE])
    ax.set_yticklabels(["1e-8", "1e-6", "1e-4", "1%", "100%", "∞"])
    ax.set_xticks([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4])
    ax.set_xticklabels(["1e-6", "1e-4", "0.01", "1", "100", "10 000"])
    ax.minorticks_off()
    ax.set_xlabel("true RMS of x")
    ax.set_ylabel("relative error of the RMS")
    ax.text(1.4e-6, 4, "float16: squares vanish", color=ORANGE, va="center")
    first = data.sizes[data.all_float16.isinf()][0].item()
    second = data.sizes[data.float16_squares.isinf()][0].item()
    ax.annotate(
        f"sum overflows\nfrom {first:.0f}",
        (first, 20),
        (first / 3, 20),
        color=ORANGE,
        ha="right",
        va="center",
        arrowprops={"arrowstyle": "-", "color": ORANGE},
    )
    ax.annotate(
        f"squares overflow\nfrom {second:.0f}",
        (second, 20),
        (second * 3, 20),
        color=ORANGE,
        va="center",
        arrowprops={"arrowstyle": "-", "color": ORANGE},
    )
    ax.text(9e4, 0.14, "all in bfloat16", color=BLUE, va="center", ha="right")
    ax.text(5e-3, 0.014, "all in float16", color=ORANGE, va="center")
    ax.text(6e-3, 3e-5, "float16 squares,\nfloat32 sum", color=ORANGE, va="bottom")
    ax.text(9e4, 4e-7, "float32 inside", color=GREEN, va="center", ha="right")
    return figure
