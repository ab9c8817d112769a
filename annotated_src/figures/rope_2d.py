"""Figures of the chapter on RoPE in two dimensions: two clocks, and their errors."""

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
    GREY_INK,
    INK,
    ORANGE,
    WIDTH,
    BookFigure,
    panels,
)
from annotated_src.positions import BlankIds, prompt_positions
from annotated_src.rotary_2d import half_frequencies, rope_table

RADIUS = 0.42
CONTEXT = ["the", "cat", "slept", "on", "[MASK]", "all", "day"]
WORDS = [*CONTEXT, "<sop>", "my", "red", "mat"]
IDS = BlankIds(sop=3, gmask=2, mask=1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_POSITIONS = 2048
HALF = 64  # features in half a head of ChatGLM-6B


class TwoClocks(NamedTuple):
    """A sentence with a blank, and where the hands of each token stand."""

    words: list[str]
    positions: Tensor  # (2, T) place and step
    per_position: Tensor  # (R,) radians that each hand turns per position
    hands: Tensor  # (2, R, T) radians from 0 to 2 pi


class PhaseErrors(NamedTuple):
    """Angle as computed in a dtype, minus position times 10000^(-i/32)."""

    errors: dict[torch.dtype, Tensor]  # (2048, 32) radians


class Wander(NamedTuple):
    """Score of two all-ones vectors a fixed distance apart, at every place."""

    distance: int
    true: float  # with exact angles; 1 at distance 0
    scores: dict[torch.dtype, Tensor]  # (2048 - distance)


def sentence_ids() -> Tensor:
    """Give each word of the example an id, the special tokens those of IDS."""
    special = {"<sop>": IDS.sop, "[MASK]": IDS.mask}
    return torch.tensor([[special.get(w, 10 + i) for i, w in enumerate(WORDS)]])


def two_clocks_data() -> TwoClocks:
    """Turn a head of 8 features: in each half a hand of 45 and one of 15 degrees."""
    positions = prompt_positions(sentence_ids(), IDS, rows=2)[0]
    frequencies = torch.tensor([math.pi / 4, math.pi / 12], dtype=torch.float64)
    cos, sin = rope_table(int(positions.max()) + 1, frequencies)
    table = torch.atan2(sin, cos) % (2 * math.pi)  # (P, R)
    return TwoClocks(WORDS, positions, frequencies, table[positions].transpose(1, 2))


def phase_errors_data() -> PhaseErrors:
    """Form every angle of half a head as the original does in each dtype."""
    positions = torch.arange(NUM_POSITIONS)[:, None]
    exact = positions * 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    rounded = half_frequencies(HALF)
    return PhaseErrors(
        {d: (positions.to(d) * rounded.to(d)).double() - exact for d in DTYPES}
    )


def wander_data(distance: int = 6) -> Wander:
    """Slide a query and a key of all ones along the text, the distance fixed."""
    exact = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    scores = {}
    for dtype in DTYPES:
        cos, sin = rope_table(NUM_POSITIONS, half_frequencies(HALF).to(dtype))
        turned = torch.complex(cos.double(), sin.double())
        products = turned[distance:] * turned[:-distance].conj()
        scores[dtype] = products.real.mean(dim=-1)
    return Wander(distance, (distance * exact).cos().mean().item(), scores)


def draw_two_clocks(data: TwoClocks) -> BookFigure:
    """Draw the sentence; below each word the dials of place, then those of step."""
    num_words, num_hands = len(data.words), len(data.per_position)
    opens = data.words.index("<sop>")
    left, right, top = -2.35, num_words - 0.45, 0.5
    height = 2 * (num_hands + 1.3) + 0.5
    figure, (ax,) = panels(height=WIDTH * height / (right - left))
    for column, word in enumerate(data.words):
        weight = "bold" if word in ("[MASK]", "<sop>") else "normal"
        ax.text(column, 0.1, word, ha="center", weight=weight)
    looks = (
        ("place", "first half", BLUE, (opens, num_words), "stand still at the blank"),
        ("step", "second half", ORANGE, (0, opens), "wait at noon"),
    )
    for row, (name, half, colour, (start, stop), words) in enumerate(looks):
        y = -0.55 - row * (num_hands + 1.3)
        ax.text(left, y, name, color=colour, weight="bold", va="center")
        low = y - num_hands - 0.62
        band = Rectangle(
            (start - 0.5, low), stop - start, y - low + 0.32, color=colour, alpha=0.06
        )
        ax.add_patch(band)
        ax.text(
            (start + stop - 1) / 2,
            low + 0.14,
            words,
            ha="center",
            color=colour,
        )
        ax.text(left, y - 1.05, half, color=colour, va="center")
        ax.text(left, y - 1.43, "of the head", color=colour, va="center")
        for column in range(num_words):
            number = str(data.positions[row, column].item())
            ax.text(column, y, number, ha="center", va="center", color=colour)
            for hand in range(num_hands):
                angle = data.hands[row, hand, column].item()
                _dial(ax, float(column), y - 0.75 - hand * 0.95, angle, colour)
    ax.set(xlim=(left, right), ylim=(top - height, top))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def draw_phase_errors(data: PhaseErrors) -> BookFigure:
    """Draw the error of all 32 pairs against position, in float32 and in float16."""
    figure, axes = panels(2, 1, height=6.6, sharex=True, sharey=True)
    titles = (
        "Model in float32: slightly other frequencies",
        "Model in float16: every angle rounded as well",
    )
    highlights = {1: BLUE, 2: ORANGE, 3: GREEN}
    for ax, dtype, title in zip(axes, DTYPES, titles, strict=False):
        errors = data.errors[dtype]
        rounds = dtype == torch.float16
        for pair in range(errors.shape[1] - 1, -1, -1):
            colour = highlights.get(pair, GREY)
            if rounds:  # neighbours jump; dots show the lanes between which they do
                size = 2.8 if pair in highlights else 1.4
                ax.plot(errors[:, pair], ".", color=colour, markersize=size, mew=0)
            else:
                width = 2.0 if pair in highlights else 0.8
                ax.plot(errors[:, pair], color=colour, linewidth=width)
        ax.set_title(title, loc="left")
        ax.set(xlim=(0, 2048), ylim=(-0.9, 0.9), ylabel="error, radians")
        ax.set_xticks([0, 512, 1024, 1536, 2048])
    for pair, (x, y) in {1: (2060, 0.215), 2: (2060, 0.325), 3: (2060, -0.15)}.items():
        words = f"pair {pair}"
        axes[0].text(x, y, words, color=highlights[pair], va="center")
    axes[0].text(2060, 0, "others", color=GREY_INK, va="center")
    worst = data.errors[torch.float16].abs().amax().item()
    words = f"worst: {worst:.2f} rad, {math.degrees(worst):.0f}°"
    axes[1].text(1180, 0.72, words, color=ORANGE)
    for pair, at in {1: (660, 0.35), 2: (480, 0.22), 3: (700, -0.3)}.items():
        axes[1].text(*at, f"pair {pair}", color=highlights[pair], ha="right")
    axes[1].set_xlabel("position")
    return figure


def draw_wander(data: Wander) -> BookFigure:
    """Draw the score against the query's position, a panel per dtype."""
    figure, axes = panels(3, 1, height=6.6, sharex=True, sharey=True)
    for ax, (dtype, scores), colour in zip(
        axes, data.scores.items(), (BLUE, ORANGE, INK), strict=True
    ):
        at = torch.arange(data.distance, data.distance + len(scores))
        line = 2.0 if dtype == torch.float32 else 0.6
        ax.plot(at, scores, color=colour, linewidth=line)
        ax.set_title(str(dtype).removeprefix("torch."), loc="left", color=colour)
        ax.set(xlim=(0, 2048), ylim=(0.55, 1.05))
        ax.set_xticks([0, 512, 1024, 1536, 2048])
    axes[1].set_ylabel(f"score at distance {data.distance}")
    axes[2].set_xlabel("position of the query")
    return figure


def _dial(ax: Axes, x: float, y: float, angle: float, colour: str) -> None:
    """Draw a dial with one hand, clockwise from noon, and shade what it passed."""
    ax.add_patch(Circle((x, y), RADIUS, facecolor="white", edgecolor=GREY, lw=0.9))
    ends = (90 - math.degrees(angle), 90.0)
    ax.add_patch(Wedge((x, y), RADIUS, *ends, facecolor=colour, alpha=0.22, lw=0))
    tip = (x + 0.36 * math.sin(angle), y + 0.36 * math.cos(angle))
    ends_of_hand = zip((x, y), tip, strict=True)
    ax.plot(*ends_of_hand, color=colour, linewidth=2.2, solid_capstyle="round")
