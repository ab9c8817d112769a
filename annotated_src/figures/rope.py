"""Figures of the chapter on rotary positions: clocks, scores, decay."""

import math
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle, Wedge
from torch import Tensor

from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    WIDTH,
    BookFigure,
    panels,
)
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables

TURN = 2 * math.pi
RADIUS = 0.41


class ClockData(NamedTuple):
    """Where the hand of each pair stands, in radians from 0 to 2 pi."""

    positions: Tensor  # (P,)
    wavelengths: Tensor  # (R,) positions per turn
    turns: Tensor  # (P, R) how often each hand has gone round, a fraction
    hands: Tensor  # (P, R)
    couples: Tensor  # (C, 2) position of a query, position of a key
    query_hands: Tensor  # (C, R)
    key_hands: Tensor  # (C, R)


class ScoreData(NamedTuple):
    """Scores of one query vector and one key vector at every pair of positions."""

    added: Tensor  # (T, T) sinusoids added to the vectors
    turned: Tensor  # (T, T) the vectors turned
    distance: int  # of the diagonal that the figure marks


class DecayData(NamedTuple):
    """How a score falls with distance, at distance 0 equal to 1."""

    near: Tensor  # (256,) distances
    bound: Tensor  # (256,) the paper's bound, base 10000
    far: Tensor  # (8192,) distances from 1
    ones: dict[float, Tensor]  # base to the score of all-ones vectors at far
    middles: Tensor  # (13,) centres of the octaves 1 to 2, 2 to 4, and so on
    means: dict[float, Tensor]  # base to the mean of ones over each octave


def clocks_data() -> ClockData:
    """Turn the 8 pairs of a head of 16 features, at 7 positions and in 2 couples."""
    positions = torch.tensor([0, 1, 2, 3, 10, 100, 1000])
    couples = torch.tensor([[13, 10], [1013, 1010]])
    frequencies = rope_frequencies(16, 10_000.0).double()
    return ClockData(
        positions,
        TURN / frequencies,
        positions[:, None] * frequencies / TURN,
        _hands(positions, frequencies),
        couples,
        _hands(couples[:, 0], frequencies),
        _hands(couples[:, 1], frequencies),
    )


def scores_data(num_positions: int = 24, distance: int = 6) -> ScoreData:
    """Put one random query and one random key, 16 features each, everywhere."""
    generator = torch.Generator().manual_seed(8)
    query, key = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    positions = torch.arange(num_positions)[None]
    # A small base, so that every pair moves visibly over so few positions.
    frequencies = rope_frequencies(16, 100.0).double()
    cos, sin = rope_tables(positions, frequencies, torch.float64)
    queries = query.expand(1, 1, num_positions, -1)
    keys = key.expand(1, 1, num_positions, -1)
    turned = apply_rotary(queries, cos, sin) @ apply_rotary(keys, cos, sin).mT
    waves = torch.cat((sin, cos), dim=-1)
    added = (queries + waves) @ (keys + waves).mT
    return ScoreData(added[0, 0], turned[0, 0], distance)


def decay_data(head_dim: int = 64) -> DecayData:
    """Sum the waves of a head of 64 features, and the paper's partial sums."""
    near = torch.arange(256)
    far = torch.arange(1, 8193)
    slow = rope_frequencies(head_dim, 10_000.0).double()
    cos, sin = rope_tables(near[None], slow, torch.float64)
    partial = torch.complex(cos, sin)[0, 0].cumsum(dim=-1)  # (256, R)
    bound = partial.abs().mean(dim=-1)
    octaves = [slice(2**i - 1, 2 ** (i + 1) - 1) for i in range(13)]
    middles = torch.tensor([far[o].double().log().mean().exp() for o in octaves])
    ones, means = {}, {}
    for base in (10_000.0, 100_000.0):
        frequencies = rope_frequencies(head_dim, base).double()
        waves, _ = rope_tables(far[None], frequencies, torch.float64)
        ones[base] = waves[0, 0].mean(dim=-1)
        means[base] = torch.stack([ones[base][o].mean() for o in octaves])
    return DecayData(near, bound / bound[0], far, ones, middles, means)


def draw_clocks(data: ClockData) -> BookFigure:
    """Draw a row of dials per position; below, the angle between two hands."""
    rows, columns = data.hands.shape
    second = -rows - 0.35  # where the lower part begins
    top, bottom, left, right = 1.3, second - 2.75, -2.55, columns - 0.5
    figure, (ax,) = panels(height=WIDTH * (top - bottom) / (right - left))
    for column, wavelength in enumerate(data.wavelengths.tolist()):
        ax.text(column, 0.97, f"pair {column}", ha="center", weight="bold")
        period = f"{wavelength:,.0f}" if wavelength > 100 else f"{wavelength:.1f}"
        ax.text(column, 0.6, period, ha="center")
    ax.text(-0.62, 0.6, "tokens per turn", ha="right")
    for row, position in enumerate(data.positions.tolist()):
        y = -float(row)
        _label(ax, y, f"position {position}", INK)
        for column in range(columns):
            hand, turns = data.hands[row, column].item(), data.turns[row, column].item()
            _dial(ax, float(column), y, 0.0, TURN if turns >= 1 else hand, BLUE)
            _hand(ax, float(column), y, hand, BLUE, 2.2)
    heading = "A score sees only the angle between the two hands"
    ax.text(left, second + 0.05, heading, weight="bold")
    for row, (query_at, key_at) in enumerate(data.couples.tolist()):
        y = second - 0.6 - row
        _label(ax, y + 0.17, f"query at {query_at}", BLUE)
        _label(ax, y - 0.17, f"key at {key_at}", ORANGE)
        for column in range(columns):
            key = data.key_hands[row, column].item()
            query = data.query_hands[row, column].item()
            _dial(ax, float(column), y, key, (query - key) % TURN, GREEN)
            _hand(ax, float(column), y, key, ORANGE, 4.5)
            _hand(ax, float(column), y, query, BLUE, 1.6)
    between = (data.query_hands - data.key_hands)[-1] % TURN
    y = second - 0.38 - len(data.couples)
    _label(ax, y + 0.06, "both angles", GREEN)
    for column, degrees in enumerate(between.rad2deg().tolist()):
        words = f"{degrees:.0f}°" if degrees > 10 else f"{degrees:.2g}°"
        ax.text(column, y, words, ha="center", color=GREEN)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def draw_scores(data: ScoreData) -> BookFigure:
    """Draw the two score tables with one diagonal marked."""
    figure, axes = panels(1, 2, height=4.7, sharey=True)
    titles = ("Sinusoids added", "Vectors turned (RoPE)")
    for ax, scores, title in zip(axes, (data.added, data.turned), titles, strict=True):
        ax.imshow(scores.numpy(), cmap="cividis")
        ax.set_title(title)
        ax.spines[:].set_visible(False)
        line = scores.diagonal(-data.distance)
        for column in range(len(line)):
            corner = (column - 0.5, column + data.distance - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", lw=1.6))
        low, high = _short(line.min().item()), _short(line.max().item())
        values = f"always {low}" if low == high else f"from {low} to {high}"
        ax.set_xlabel(
            f"key's position $n$\ndistance {data.distance}, outlined: {values}"
        )
    axes[0].set_ylabel("query's position $m$")
    return figure


def draw_decay(data: DecayData) -> BookFigure:
    """Draw the paper's bound, and the all-ones score for two bases."""
    figure, (left, right) = panels(1, 2, height=3.5)
    left.plot(data.near, data.bound, color=INK)
    left.set_title("The paper's bound, base 10,000")
    left.set_ylabel("relative to distance 0")
    left.set(xlabel="distance", xlim=(0, 256), ylim=(0, 1.03))
    right.axhline(0, color=GREY, linewidth=0.8)
    places = ((6, 0.28, "base 10,000"), (60, 0.74, "base 100,000"))
    for base, colour, (x, y, words) in zip(
        data.ones, (BLUE, ORANGE), places, strict=True
    ):
        right.semilogx(
            data.far, data.ones[base], color=colour, linewidth=0.5, alpha=0.3
        )
        right.semilogx(data.middles, data.means[base], color=colour, linewidth=2.6)
        right.text(x, y, words, color=colour)
    right.set_title("Score of all-ones vectors")
    right.set_xticks([1, 10, 100, 1000, 8192], ["1", "10", "100", "1000", "8192"])
    right.minorticks_off()
    right.set(xlabel="distance", xlim=(1, 8192), ylim=(-0.3, 1.03))
    return figure


def _hands(positions: Tensor, frequencies: Tensor) -> Tensor:
    cos, sin = rope_tables(positions[None], frequencies, torch.float64)
    return torch.atan2(sin, cos)[0, 0] % TURN


def _label(ax: Axes, y: float, words: str, colour: str) -> None:
    ax.text(-0.62, y, words, ha="right", va="center", color=colour)


def _dial(
    ax: Axes, x: float, y: float, start: float, sweep: float, colour: str
) -> None:
    """Draw a dial, and shade sweep radians clockwise from start, 0 being noon."""
    ax.add_patch(Circle((x, y), RADIUS, facecolor="white", edgecolor=GREY, lw=0.9))
    ends = (90 - math.degrees(start + sweep), 90 - math.degrees(start))
    ax.add_patch(Wedge((x, y), RADIUS, *ends, facecolor=colour, alpha=0.22, lw=0))


def _hand(
    ax: Axes, x: float, y: float, angle: float, colour: str, width: float
) -> None:
    tip = (x + 0.37 * math.sin(angle), y + 0.37 * math.cos(angle))
    ax.plot(
        *zip((x, y), tip, strict=True),
        color=colour,
        linewidth=width,
        solid_capstyle="round",
    )


def _short(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")
