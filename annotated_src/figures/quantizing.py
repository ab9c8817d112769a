"""Pictures of quantisation: one row, how far its largest stands out, whole models."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor, nn

from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    BookFigure,
    panels,
)
from annotated_src.grading import Grades, grade, text_perplexity
from annotated_src.models.llama import Llama
from annotated_src.quantize import (
    dequantize_groups,
    quantize_,
    quantize_groups,
    weight_bytes,
)

KINDS = ("8 bits, one scale", "4 bits, one scale", "4 bits, groups of 32")
KIND_BITS = (8, 4, 4)


class RowData(NamedTuple):
    """One row of a weight, and what is left of it on three grids."""

    weight: Float[Tensor, "cols"]
    rounded: Float[Tensor, "kinds cols"]
    steps: Float[Tensor, "kinds cols"]  # the scale that each column has
    zeros: Float[Tensor, "kinds"]  # share that became 0
    decibels: Float[Tensor, "kinds"]  # signal to noise


def row_data(row: Float[Tensor, "cols"], group_size: int = 32) -> RowData:
    """Round a row on the grids of KINDS."""
    found = []
    sizes = (len(row), len(row), group_size)
    for bits, size in zip(KIND_BITS, sizes, strict=True):
        integers, scale = quantize_groups(row[None], bits, size)
        rounded = dequantize_groups(integers, scale)[0]
        step = scale[0].repeat_interleave(size)
        zeros = (integers == 0).float().mean()
        found.append((rounded, step, zeros, decibels(row, rounded)))
    parts = (torch.stack(part) for part in zip(*found, strict=True))
    return RowData(row, *parts)


def decibels(
    signal: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Return the signal's power by that of the noise, in dB: 10 more is ten times."""
    noise = (rounded - signal).double().square().sum()
    return 10 * torch.log10(signal.double().square().sum() / noise)


def crest(x: Float[Tensor, "*rows cols"]) -> Float[Tensor, "*rows"]:
    """Return how far the largest stands out: the maximum by the root mean square."""
    x = x.float()
    return x.abs().amax(dim=-1) / x.square().mean(dim=-1).sqrt()


def draw_row(data: RowData, first: int, count: int = 128) -> BookFigure:
    """Draw some columns of it, before and after, and the grid behind them."""
    figure, axes = panels(3, 1, height=7.4, sharex=True)
    columns = torch.arange(first, first + count)
    weight, limit = data.weight[columns], 1.45
    top = int(data.weight.abs().argmax())
    for kind, ax in enumerate(axes):
        step, rounded = data.steps[kind, columns], data.rounded[kind, columns]
        _grid(ax, columns, step, KIND_BITS[kind])
        hollow = {"facecolor": "white", "edgecolor": INK, "lw": 0.9}
        ax.scatter(columns, weight, s=17, label="before", zorder=2, **hollow)
        ax.scatter(columns, rounded, s=17, color=BLUE, lw=0, label="rounded", zorder=3)
        zeros = f"{data.zeros[kind]:.0%}" if kind != 1 else f"{data.zeros[kind]:.1%}"
        ax.set_title(f"{KINDS[kind]}: {zeros} of the row becomes 0", loc="left")
        ax.set(ylim=(-limit, limit), xlim=(first - 1, first + count), ylabel="weight")
        if first <= top < first + count:
            edge = limit if data.weight[top] > 0 else -limit
            arrow = {"arrowstyle": "->", "color": ORANGE, "lw": 1.6}
            ax.annotate("", (top, edge), (top, 0.72 * edge), arrowprops=arrow)
            words = f"one weight of {data.weight[top]:.2f}".replace("-", "−")
            paper = {"facecolor": "white", "lw": 0, "pad": 1.5}
            ax.text(
                top + 2.5, 0.84 * edge, words, color=ORANGE, va="center", bbox=paper
            )
    free = "upper right" if data.weight[top] < 0 else "lower right"
    axes[1].legend(loc=free, ncols=2, handletextpad=0, borderpad=0.1, markerscale=1.8)
    axes[-1].set_xlabel("column")
    return figure


def _grid(ax: Axes, columns: Tensor, steps: Tensor, bits: int) -> None:
    """Draw the values that each stretch of columns can have, and no others."""
    starts = [0, *((steps.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(steps)]
    for begin, end in pairwise(starts):
        half = 2 ** (bits - 1)
        ends = (int(columns[begin]) - 0.5, int(columns[end - 1]) + 0.5)
        values = [q * float(steps[begin]) for q in range(-half, half)]
        ax.hlines(values, *ends, color=GREEN, lw=0.8, alpha=0.45, zorder=1)


class CrestData(NamedTuple):
    """How far the largest stands out, in rows of weights and in tokens."""

    weights: Float[Tensor, "rows"]
    tokens: Float[Tensor, "seen"]


@torch.no_grad()
def crest_data(model: Llama, tokens: Int[Tensor, "B T"]) -> CrestData:
    """Look at each row of the blocks' matrices, and at each token that they are given.

    Matrices that share an input count it once.
    """
    linears = [part for part in model.blocks.modules() if isinstance(part, nn.Linear)]
    given: dict[int, Tensor] = {}

    def watch(_part: nn.Module, inputs: tuple[Tensor]) -> None:
        given[id(inputs[0])] = inputs[0]  # kept, so that no other gets its id

    hooks = [part.register_forward_pre_hook(watch) for part in linears]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.cat([crest(part.weight) for part in linears])
    return CrestData(rows, torch.cat([crest(x).flatten() for x in given.values()]))


def draw_crest(data: CrestData) -> BookFigure:
    """Draw both distributions, and what 8 bits leave of each as signal to noise."""
    figure, (ax,) = panels(height=3.9)
    low, high = 1.8, 45.0
    edges = torch.logspace(math.log10(low), math.log10(high), 70)
    for values, colour, name, side in (
        (data.weights, BLUE, "rows of weights", "top"),
        (data.tokens, ORANGE, "tokens", "bottom"),
    ):
        counts = torch.histogram(values.clamp(low, high).cpu(), edges).hist
        shares = (counts / counts.sum()).tolist()
        ax.stairs(shares, edges.tolist(), fill=True, color=colour, alpha=0.35, lw=0)
        ax.stairs(shares, edges.tolist(), color=colour, lw=1.6)
        middle, peak = float(values.median()), max(shares)
        noise = 20 * math.log10(127.5 / middle * 12**0.5)
        words = f"{name}:\nmedian {middle:.1f}, {noise:.0f} dB"
        ax.text(1.14 * middle, 1.02 * peak, words, color=colour, va=side)
    ax.set_xscale("log")
    ticks = (2, 3, 5, 10, 20, 40)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(xlim=(low, high), yticks=[], xlabel="largest magnitude by root mean square")
    ax.spines["left"].set_visible(False)
    ax.set_title("How far the largest stands out, and what 8 bits leave", loc="left")
    return figure


Call = tuple[str, str | None, int | None]
Setting = tuple[str, str, Sequence[Call]]
_WHOLE_ROWS = (
    ("int4-grouped", "down_proj", 1536),
    ("int4-grouped", "attention|gate|up", 576),
)
SETTINGS: tuple[Setting, ...] = (
    ("int8", "weights only", (("int8-weight-only", None, None),)),
    ("int8", "activations too", (("int8-dynamic", None, None),)),
    *(
        ("int4", f"groups of {size}", (("int4-grouped", None, size),))
        for size in (8, 32, 64)
    ),
    ("int4", "whole rows", _WHOLE_ROWS),
)
"""What to call for each point of SmolLM2's figure: scheme, match and group_size."""


class FrontierPoint(NamedTuple):
    """A quantised model: how large it is, and how far from the model in full."""

    kind: str
    name: str
    megabytes: float
    grades: Grades
    perplexity: float


class FrontierData(NamedTuple):
    """All of them, and the model in full."""

    points: list[FrontierPoint]
    full: float  # megabytes
    kept: float  # megabytes that no scheme touches: embeddings, norms
    perplexity: float


@torch.no_grad()
def frontier_data(
    model: Llama,
    tokens: Int[Tensor, "B T"],
    settings: Sequence[Setting] = SETTINGS,
) -> FrontierData:
    """Quantise copies of the model, and grade them on one text."""
    reference, points = model(tokens), []
    for kind, name, calls in settings:
        copied = copy.deepcopy(model)
        for scheme, match, group_size in calls:
            quantize_(copied, scheme, match, group_size)
        logits = copied(tokens)
        grades, surprise = grade(reference, logits), text_perplexity(logits, tokens)
        size = weight_bytes(copied) / 1e6
        points.append(FrontierPoint(kind, name, size, grades, surprise))
    linears = (part for part in model.modules() if isinstance(part, nn.Linear))
    full = weight_bytes(model) / 1e6
    kept = full - sum(part.weight.nbytes for part in linears) / 1e6
    return FrontierData(points, full, kept, text_perplexity(reference, tokens))


def draw_frontier(data: FrontierData) -> BookFigure:
    """Draw the price of each against its size; the best are at the lower left."""
    figure, (ax,) = panels(height=4.6)
    ax.axvspan(0, data.kept, color=GREY, alpha=0.18, lw=0)
    words = f"not quantised:\nthe embedding,\n{data.kept:.0f} MB"
    ax.text(data.kept / 2, 0.01, words, ha="center", va="center", color=INK)
    fours = [point for point in data.points if point.kind == "int4"]
    ax.plot(
        [point.megabytes for point in fours],
        [point.grades.mean_kl for point in fours],
        color=ORANGE,
        lw=1.2,
        alpha=0.5,
    )
    for point in data.points:
        colour = ORANGE if point.kind == "int4" else BLUE
        at = (point.megabytes, point.grades.mean_kl)
        mark = "s" if point.kind == "int4" else "o"
        ax.scatter(*at, color=colour, s=50, marker=mark, zorder=3)
        left = point.name in ("whole rows", "groups of 64")
        ax.annotate(
            point.name if left else f"{point.kind}, {point.name}",
            at,
            (-9 if left else 9, 0 if left else 6),
            textcoords="offset points",
            color=colour,
            ha="right" if left else "left",
            va="center",
        )
    ax.set_yscale("log")
    ticks = (0.003, 0.01, 0.03, 0.1, 0.3, 1)
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(xlim=(0, 315), ylim=(0.002, 1.6), xlabel="megabytes in memory")
    ax.set_title(f"Mean KL in nats; in full it has {data.full:.0f} MB", loc="left")
    return figure
