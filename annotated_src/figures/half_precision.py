"""Figures of the chapter on half precision: gaps between scores, three fills."""

import math
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    BookFigure,
    panels,
)

HEAD_DIM = 128
ROOT = math.sqrt(HEAD_DIM)
PRODUCT_FIRST = "product, then root"


class GapData(NamedTuple):
    """How far it is from a score to the next that float16 can tell from it."""

    scores: Tensor  # (P,) as the softmax sees them
    gaps: dict[str, Tensor]  # way of computing to (P,); NaN where float16 overflows
    ends: dict[str, float]  # way of computing to its largest score


class FillData(NamedTuple):
    """Softmax weights of two rows, with three fills in place of hidden scores."""

    scores: Tensor  # (S,)
    visible: Tensor  # (S,) of the first row; the second sees nothing
    fills: tuple[float, ...]
    weights: Tensor  # (row, fill, S)


def spacing(x: Tensor) -> Tensor:
    """Subtract each positive float16 number from the next; in float64."""
    following = (x.view(torch.int16) + 1).view(torch.float16)
    gap = following.double() - x.double()
    below_last = x.double() - (x.view(torch.int16) - 1).view(torch.float16).double()
    return torch.where(following.isinf(), below_last, gap)


def gaps_data() -> GapData:
    """Push scores from 2^-31 to 2^21 through float16, in three orders."""
    scores = 2 ** torch.linspace(-31, 21, 52 * 16 + 1, dtype=torch.float64)
    product = (scores * ROOT).half()
    quotient = (product.double() / ROOT).half()
    gaps = {PRODUCT_FIRST: torch.maximum(spacing(product) / ROOT, spacing(quotient))}
    gaps[PRODUCT_FIRST][product.isinf()] = torch.nan
    ends = {PRODUCT_FIRST: torch.finfo(torch.float16).max / ROOT}
    for layer in (1, 28):
        stored = (scores / layer).half()
        gap = layer * spacing(stored)
        gap[stored.isinf()] = torch.nan
        gaps[f"layer {layer}"] = gap
        ends[f"layer {layer}"] = layer * torch.finfo(torch.float16).max
    return GapData(scores, gaps, ends)


def fills_data() -> FillData:
    """Two hidden keys before four visible ones, whose scores are all below -20."""
    scores = torch.tensor([-25.0, -24.0, -25.0, -26.0, -24.0, -25.0])
    visible = torch.tensor([False, False, True, True, True, True])
    fills = (-20.0, -10_000.0, -math.inf)
    rows = (visible, torch.zeros_like(visible))
    weights = torch.stack(
        [
            torch.stack([scores.masked_fill(~row, f).softmax(dim=-1) for f in fills])
            for row in rows
        ]
    )
    return FillData(scores, visible, fills, weights)


def draw_gaps(data: GapData) -> BookFigure:
    """Draw three staircases that differ at their ends only."""
    figure, (ax,) = panels(height=4.6)
    ax.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.text(6e-10, 1.6, "a gap of 1", color=INK)
    words = {
        PRODUCT_FIRST: f"product, then root: to {data.ends[PRODUCT_FIRST]:.0f}",
        "layer 1": f"layer 1: to {data.ends['layer 1']:.0f}",
        "layer 28": f"layer 28: to {data.ends['layer 28'] / 1e6:.1f} million",
    }
    looks = ((GREEN, 5.0, 0.45), (BLUE, 2.2, 1.0), (ORANGE, 2.2, 1.0))
    for (name, gap), (colour, width, alpha) in zip(
        data.gaps.items(), looks, strict=True
    ):
        ax.loglog(data.scores, gap, color=colour, linewidth=width, alpha=alpha)
        last = gap[gap.isfinite()][-1].item()
        ax.plot(data.ends[name], last, "o", color=colour, markersize=8)
        ax.text(
            data.ends[name] / 4,
            last * (1.3 if name == PRODUCT_FIRST else 1),
            words[name],
            color=colour,
            ha="right",
            va="center",
        )
        if name != PRODUCT_FIRST:
            ax.text(6e-10, 1.8 * gap[0].item(), name, color=colour)
    ax.set(xlabel="score that the softmax sees", ylabel="gap to the next score")
    ax.set(xlim=(3e-10, 1e7), ylim=(8e-9, 2e4))
    ax.set_xticks([1e-9, 1e-6, 1e-3, 1, 1e3, 1e6])
    ax.minorticks_off()
    return figure


def draw_fills(data: FillData) -> BookFigure:
    """Draw a panel per fill and row, hidden keys in another colour."""
    figure, axes = panels(2, 3, height=4.4, sharex=True, sharey=True)
    titles = ["fill " + _short(fill) for fill in data.fills]
    seen = (data.visible, torch.zeros_like(data.visible))
    for i, ax in enumerate(axes):
        row, column = divmod(i, 3)
        ax.tick_params(axis="x", length=0)
        _bars(ax, data.weights[row, column], seen[row])
        if row == 0:
            ax.set_title(titles[column])
        else:
            ax.set_xticks([0.5, 3.5], ["padding", "tokens"])
        if column == 0:
            ax.set_ylabel(("a token's row", "padding's row")[row] + "\nweight")
    axes[0].set_ylim(0, 0.65)
    return figure


def _bars(ax: Axes, weights: Tensor, visible: Tensor) -> None:
    if weights.isnan().all():
        ax.text(2.5, 0.3, "NaN", ha="center", va="center", size=26, color=ORANGE)
        return
    bars = ax.bar(range(len(weights)), weights.tolist(), color=BLUE)
    for bar, see in zip(bars, visible.tolist(), strict=True):
        if not see:
            bar.set(facecolor=ORANGE, hatch="//", edgecolor="white")


def _short(fill: float) -> str:
    return "−∞" if math.isinf(fill) else f"−{-fill:.0f}"
