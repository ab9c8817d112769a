"""Pictures of choosing: a distribution as a strip, what filters cut, how loops grow."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor

from annotated_src.figures.style import (
    BLUE,
    INK,
    ORANGE,
    PALE_ORANGE,
    SKY,
    BookFigure,
    panels,
)
from annotated_src.scoring import token_log_probs

Filter = Callable[[Tensor], Tensor]  # (1, V) logits to (1, V) logits
TAIL, CUT = "#D5DAE0", PALE_ORANGE
LETTER = 0.0146  # the width of one, on a strip of width 1


class Strip(NamedTuple):
    """What one filter leaves, in the order that held before it."""

    name: str
    shares: Float[Tensor, "V"]
    kept: int
    mass: float  # of what is kept, before the filter


class StripData(NamedTuple):
    """One distribution, best first, and what filters make of it."""

    prompt: str
    words: tuple[str, ...]  # the most likely
    before: Float[Tensor, "V"]
    strips: tuple[Strip, ...]
    come: Bool[Tensor, "V"] | None = None  # in the text already


def strip_data(
    prompt: str,
    logits: Float[Tensor, "1 V"],
    decode: Callable[[list[int]], str],
    filters: Mapping[str, Filter],
    come: Int[Tensor, "1 T"] | None = None,
) -> StripData:
    """Sort the next token's probabilities once, and follow them through each filter."""
    shares, ids = logits[0].double().softmax(dim=-1).sort(descending=True, stable=True)
    words = tuple(_word(decode([i])) for i in ids[:2000].tolist())
    strips = []
    for name, apply in filters.items():
        scores = apply(logits)[0, ids].double()
        stays = scores.isfinite()
        mass = shares[stays].sum().item()
        strips.append(Strip(name, scores.softmax(dim=-1), int(stays.sum()), mass))
    has_come = None if come is None else torch.isin(ids, come)
    return StripData(prompt, words, shares, tuple(strips), has_come)


def _word(text: str) -> str:
    return text.strip() or text.replace(" ", "␣").replace("\n", "↵")


def hit(shares: Float[Tensor, "V"], dart: float) -> int:
    """Find the rank of the token that lies at a point of the strip."""
    return int((shares.cumsum(0) <= dart).sum())


def draw_strips(
    data: Sequence[StripData], dart: float | None = None, ghosts: bool = False
) -> BookFigure:
    """Draw each distribution's strips; with ghosts, what they were before the cut.

    What has come already, if the data say so, is orange.
    """
    step = 2.6 if ghosts else 1.95
    top = 1.84 if ghosts else 1.2
    rows = max(len(d.strips) for d in data)
    figure, axes = panels(len(data), 1, height=(0.4 + 0.42 * step * rows) * len(data))
    for ax, d in zip(axes, data, strict=True):
        for row, strip in enumerate(d.strips):
            bottom = -step * row
            said = _kept(d, strip) if dart is None else _hit(d, strip, dart)
            ax.text(0, bottom + top, strip.name, weight="bold", va="bottom")
            ax.text(1, bottom + top, said, va="bottom", ha="right")
            _segments(ax, d, strip, bottom)
            if ghosts:
                _ghost(ax, strip.mass, bottom)
            if dart is not None:
                ends = [bottom - 0.1, bottom + 1.1]
                ax.plot([dart, dart], ends, color=ORANGE, lw=2.5)
                ax.plot([dart], [bottom + 1.2], "v", color=ORANGE, ms=7)
        ax.set(xlim=(-0.003, 1.003), ylim=(-step * (rows - 1) - 0.2, top + 0.9))
        ax.axis("off")
        ax.set_title(f"“{d.prompt} …”", loc="left", style="italic")
    return figure


def _kept(data: StripData, strip: Strip) -> str:
    if data.come is not None:
        return f"{strip.shares[data.come].sum():.0%} for what has come already"
    tokens = "token stays" if strip.kept == 1 else "tokens stay"
    return f"{strip.kept} {tokens}, which had {strip.mass:.0%}"


def _hit(data: StripData, strip: Strip, dart: float) -> str:
    rank = hit(strip.shares, dart)
    word = data.words[rank] if rank < len(data.words) else f"no. {rank + 1:,}"
    return f"best {strip.shares[0]:.0%}, u = {dart:g} is “{word}”"


def _segments(ax: Axes, data: StripData, strip: Strip, bottom: float) -> None:
    left, shown = 0.0, 0
    words, shares, come = data.words, strip.shares.tolist(), data.come
    for place, (word, share) in enumerate(zip(words, shares, strict=False)):
        if share < 0.004:
            continue
        fill, ink = (BLUE, "white") if shown % 2 == 0 else (SKY, INK)
        box = Rectangle((left, bottom), share, 1, fc=fill, ec="white", lw=0.4)
        if come is not None and come[place]:
            fill, ink = ORANGE, "white"
            box.set(facecolor=fill, hatch="////", edgecolor="#E59A62")
        ax.add_patch(box)
        if (len(word) + 0.6) * LETTER < share:
            ground = {"facecolor": fill, "lw": 0, "pad": 1.5}
            style = {"color": ink, "ha": "center", "va": "center", "bbox": ground}
            ax.text(left + share / 2, bottom + 0.47, word, **style)
        left, shown = left + share, shown + 1
    if shown < strip.kept:
        ax.add_patch(Rectangle((left, bottom), 1 - left, 1, fc=TAIL, ec="none"))
        more = f"{strip.kept - shown:,} more"
        if (len(more) + 1) * LETTER < 1 - left:
            ax.text(0.988, bottom + 0.47, more, ha="right", va="center")


def _ghost(ax: Axes, mass: float, bottom: float) -> None:
    """Draw the strip as it was, and how its kept end is stretched."""
    ghost = bottom + 1.42
    ax.add_patch(Rectangle((0, ghost), mass, 0.32, fc=BLUE, ec="none"))
    ax.add_patch(
        Rectangle((mass, ghost), 1 - mass, 0.32, fc=CUT, ec="white", lw=0, hatch="////")
    )
    corners = [(0, ghost), (mass, ghost), (1, bottom + 1), (0, bottom + 1)]
    ax.add_patch(Polygon(corners, fc=BLUE, ec="none", alpha=0.13))


COLOURS, MARKS, TAILS = (BLUE, ORANGE), ("o", "s"), ("-", (0, (3, 1.5)))


def draw_cuts(data: Sequence[StripData]) -> BookFigure:
    """Draw the cuts of top-k, top-p and min-p, each against what it looks at."""
    figure, axes = panels(1, 3, height=4.4)
    places = torch.arange(1, len(data[0].before) + 1).numpy()
    for d, colour, mark, tail in zip(data, COLOURS, MARKS, TAILS, strict=True):
        heights = (d.before, d.before.cumsum(0), d.before / d.before[0])
        for ax, y, strip in zip(axes, heights, d.strips, strict=True):
            ax.plot(places, y.numpy(), color=colour, lw=1.4, ls=tail)
            ax.plot(places[: strip.kept], y[: strip.kept].numpy(), color=colour, lw=4)
            ax.plot([strip.kept], [y[strip.kept - 1]], mark, color=colour, ms=9)
    for i, ax in enumerate(axes):
        _cut(ax, data, i)
    axes[1].set_xlabel("place, most likely first")
    names = [f"{d.prompt} …" for d in data]
    looks = zip(COLOURS, MARKS, TAILS, strict=True)
    lines = [Line2D([], [], color=c, marker=m, ls=t, ms=9) for c, m, t in looks]
    figure.legend(lines, names, loc="outside lower left", ncols=2, columnspacing=1)
    return figure


def _cut(ax: Axes, data: Sequence[StripData], i: int) -> None:
    """Draw where the filter in this place cuts, and say what it keeps."""
    name = data[0].strips[i].name
    line = ax.axvline if i == 0 else ax.axhline
    line(float(name.split()[-1]), color=INK, lw=1.2, ls="--")
    ax.set_xscale("log")
    ax.set_yscale("linear" if i == 1 else "log")
    end = len(data[0].before)
    ax.set(xlim=(0.8, end), ylim=(0, 1.03) if i == 1 else (1e-5, 1.6))
    ax.set_xticks([1, 100, 10_000], ["1", "100", "10,000"])
    ax.minorticks_off()
    what = ("probability", "sum so far", "share of the best")[i]
    ax.set_title(f"{name}\n{what}", loc="left")
    for d, colour, y in zip(data, COLOURS, (0.17, 0.08), strict=True):
        y += 0 if i == 1 else 0.77
        paper = {"facecolor": "white", "lw": 0, "pad": 1}
        style = {"color": colour, "ha": "right", "weight": "bold", "bbox": paper}
        words = f"keeps {d.strips[i].kept}"
        ax.text(0.97, y, words, style, transform=ax.transAxes)


class LoopData(NamedTuple):
    """How likely each token of a sentence was, each time that it was said."""

    words: tuple[str, ...]
    chances: Float[Tensor, "times words"]


def loop_data(
    model: torch.nn.Module, tokens: Int[Tensor, "1 T"], words: Sequence[str], times: int
) -> LoopData:
    """Score a text that ends in the same sentence, several times over."""
    scores = token_log_probs(model, tokens)[0, -times * len(words) :]
    return LoopData(tuple(words), scores.double().exp().unflatten(0, (times, -1)))


def draw_loop(data: LoopData) -> BookFigure:
    """Draw one line for each time, paler for earlier ones."""
    figure, (ax,) = panels(height=3.9)
    last = len(data.chances) - 1
    for time, chances in enumerate(data.chances.tolist()):
        colour, style = (ORANGE, "o--") if time == 0 else (BLUE, "o-")
        alpha = 1.0 if time in (0, last) else 0.2 + 0.5 * time / last
        ax.plot(chances, style, color=colour, alpha=alpha, ms=5)
    first, end = data.chances[0, -1].item(), data.chances[-1, -1].item()
    right = len(data.words) - 0.85
    if abs(end - first) < 0.08:  # move the words apart
        first, end = (
            (first - 0.04, end + 0.04) if end > first else (first + 0.04, end - 0.04)
        )
    ax.text(right, first, "1st time", color=ORANGE, va="center")
    ax.text(right, end, f"{last + 1}th time", color=BLUE, va="center")
    ax.set_xticks(range(len(data.words)), data.words)
    ax.set(xlim=(-0.3, len(data.words) + 0.3), ylim=(0, 1.04))
    ax.set_title("Probability of each token of the sentence", loc="left")
    return figure
