"""Pictures of tokens: merges as a wall of bricks, and what each script costs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from annotated_src.byte_alphabet import to_bytes
from annotated_src.byte_pair import BytePairEncoder, cut_pieces
from annotated_src.figures.style import (
    BLUE,
    GREY_INK,
    INK,
    ORANGE,
    BookFigure,
    ink_on,
    panels,
)

BYTE_GREY = (0.93, 0.94, 0.95)
ARTICLE_1 = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Vietnamese": (
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền."
    ),
    "Greek": (
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα "
        "δικαιώματα."
    ),
    "Japanese": (
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等で"
        "ある。"
    ),
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Hindi": (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।"
    ),
}
"""The first sentence of the Universal Declaration of Human Rights."""


class Brick(NamedTuple):
    """A token that some merge made, or a byte: over which bytes it lies, how high."""

    token: str
    start: int
    stop: int
    level: int  # a byte is 0, a merge one more than the higher of its parts
    roof: int  # the level of what it became part of; its own + 1, if it stayed
    merge: int  # which merge made it, the first is 1; 0 for a byte
    final: bool


def wall_data(encoder: BytePairEncoder, text: str) -> list[Brick]:
    """Build what each merge of a text made, in the order of building.

    Raises:
        ValueError: a byte that the vocabulary lacks; the wall would have a hole.
    """
    wall: list[Brick] = []
    start = 0
    for piece in cut_pieces(text, encoder.patterns):
        stages = list(encoder.merges_of(piece))
        if len(stages[0]) != len(piece.encode()):
            raise ValueError(f"the vocabulary lacks a byte of {piece!r}")
        row = [
            Brick(token, start + i, start + i + 1, 0, 1, 0, True)
            for i, token in enumerate(stages[0])
        ]
        start += len(row)
        for stage in stages[1:]:
            row = _merge(encoder, row, stage, wall)
        wall += row
    return sorted(wall, key=lambda brick: (brick.level, brick.start))


def _merge(
    encoder: BytePairEncoder, row: list[Brick], stage: list[str], wall: list[Brick]
) -> list[Brick]:
    """Lay the brick that turns a row into the next stage; put its parts in the wall."""
    at = next(i for i, token in enumerate(stage) if token != row[i].token)
    parts = row[at : at + 2]
    level = 1 + max(part.level for part in parts)
    wall += [part._replace(roof=level, final=False) for part in parts]
    merge = encoder.ranks[parts[0].token, parts[1].token] + 1
    made = Brick(
        stage[at], parts[0].start, parts[1].stop, level, level + 1, merge, True
    )
    return [*row[:at], made, *row[at + 2 :]]


def token_text(token: str) -> str:
    """Write a token to be read: a space as ·, part of a character in hexadecimal."""
    held = to_bytes(token)
    try:
        return held.decode("utf-8").replace(" ", "·")
    except UnicodeDecodeError:
        return held.hex(" ").upper().replace("20 ", "·")


def draw_wall(walls: Sequence[Sequence[Brick]], last_merge: int) -> BookFigure:
    """Draw walls, one below the other; last_merge is the number of all merges."""
    width = max(brick.stop for wall in walls for brick in wall)
    levels = [max(brick.level for brick in wall) + 1 for wall in walls]
    figure, axes = panels(
        len(walls),
        1,
        height=1.0 + 0.42 * sum(levels),
        height_ratios=levels,
    )
    scale = ScalarMappable(LogNorm(1, last_merge), "YlGnBu_r")
    for ax, wall in zip(axes, walls, strict=True):
        for brick in wall:
            _lay(ax, brick, scale)
        ax.set_xlim(-0.1, width + 0.1)
        ax.set_ylim(-0.05, max(brick.level for brick in wall) + 1.05)
        ax.axis("off")
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=50
    )
    ticks = [1, 10, 100, 1000, 10_000]
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label("learnt as merge number")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def _lay(ax: Axes, brick: Brick, scale: ScalarMappable) -> None:
    colours = scale.to_rgba(np.array([max(brick.merge, 1)]))
    rgb = colours[0, :3].tolist() if brick.merge else BYTE_GREY
    ax.add_patch(
        Rectangle(
            (brick.start + 0.03, brick.level + 0.04),
            brick.stop - brick.start - 0.06,
            brick.roof - brick.level - 0.08,
            facecolor=rgb,
            edgecolor=ORANGE if brick.final else "white",
            linewidth=2.4 if brick.final else 0,
        )
    )
    label = token_text(brick.token)
    narrow = len(label) > 2 * (brick.stop - brick.start) - 1  # bytes in hexadecimal
    ax.text(
        (brick.start + brick.stop) / 2,
        brick.level + 0.46,
        label.replace(" ", ""),
        ha="center",
        va="center",
        family="DejaVu Sans Mono",
        fontsize=12 if narrow else 14,
        fontweight="bold" if brick.final and not narrow else "normal",
        color=ink_on(rgb),
    )


class ScriptCost(NamedTuple):
    """How long one sentence is in a language, counted in three ways."""

    language: str
    characters: int
    num_bytes: int
    tokens: int


def script_data(
    encoder: BytePairEncoder, sentences: dict[str, str] = ARTICLE_1
) -> list[ScriptCost]:
    """Count the sentences, the one of fewest tokens first."""
    found = [
        ScriptCost(name, len(text), len(text.encode()), len(encoder.encode(text)))
        for name, text in sentences.items()
    ]
    return sorted(found, key=lambda cost: cost.tokens)


def draw_scripts(costs: Sequence[ScriptCost]) -> BookFigure:
    """Draw a bar of tokens for each language; marks for its characters and bytes."""
    figure, (ax,) = panels(height=5.4)
    rows = range(len(costs))
    ax.barh(rows, [c.tokens for c in costs], color=BLUE, height=0.62, label="tokens")
    dots = {"color": "white", "mec": INK, "mew": 1.6, "ms": 9, "label": "characters"}
    ax.plot([c.characters for c in costs], rows, "o", **dots)
    ticks = {"color": GREY_INK, "ms": 14, "mew": 3, "label": "bytes", "zorder": 1.5}
    ax.plot([c.num_bytes for c in costs], rows, "|", **ticks)
    for row, cost in enumerate(costs):
        at = {"xytext": (5, 0), "textcoords": "offset points"}
        number = ax.annotate(str(cost.tokens), (0, row), **at, va="center")
        number.set(color="white", weight="bold")
    least, most = costs[0], costs[-1]
    times = (
        f"{most.tokens / least.tokens:.0f} times as many\ntokens as {least.language}"
    )
    ax.text(1.06 * most.tokens, len(costs) - 1, times, color=BLUE, va="center")
    ax.set_yticks(list(rows), [c.language for c in costs])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set_xlabel("length of the same sentence")
    ax.legend(loc="upper right")
    return figure
