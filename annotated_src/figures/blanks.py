"""Figures of the chapter on blanks: two numbers a token, and what one gives away."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.blank_infilling import Example, mask_rest, mask_span
from annotated_src.figures.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    SIZE,
    BookFigure,
    panels,
)
from annotated_src.positions import BlankIds, context_lengths, prompt_positions

SENTENCE = ("she", "opened", "the", "door", "and", "left")
ANSWERS = (("it",), ("the", "door"), ("a", "very", "old", "box"))
SPECIAL = ("<sop>", "[gMASK]", "[MASK]", "<eop>")
BEFORE, AFTER = 2, 2  # words before the blank and after it, in what ANSWERS fill


class Numbered(NamedTuple):
    """Words, and the two numbers of each; the first context of them are the context."""

    words: list[str]
    places: Int[Tensor, "T"]
    steps: Int[Tensor, "T"]
    context: int


class LeakData(NamedTuple):
    """One context, answers of several lengths, numbered in two ways."""

    original: list[Numbered]  # where each word stood; words only, steps all 0
    blank: list[Numbered]  # place and step


def ids_data() -> tuple[Numbered, Numbered]:
    """Give SENTENCE its numbers, with a blank inside it and with one at its end."""
    text = list(range(len(SPECIAL), len(SPECIAL) + len(SENTENCE)))
    *ids, eop = range(len(SPECIAL))
    blanks = BlankIds(*ids)
    inside = mask_span(text, BEFORE, BEFORE + 2, blanks, eop)
    at_end = mask_rest(text, BEFORE + 1, blanks, eop)
    return _numbered(inside, SENTENCE, blanks), _numbered(at_end, SENTENCE, blanks)


def leak_data() -> LeakData:
    """Fill the same blank with each of ANSWERS."""
    original, blank = [], []
    *ids, eop = range(len(SPECIAL))
    blanks = BlankIds(*ids)
    for answer in ANSWERS:
        words = (*SENTENCE[:BEFORE], *answer, *SENTENCE[-AFTER:])
        text = list(range(len(SPECIAL), len(SPECIAL) + len(words)))
        end = BEFORE + len(answer)
        example = mask_span(text, BEFORE, end, blanks, eop)
        blank.append(_numbered(example, words, blanks))
        # Context first, as in blank; each word keeps the place it had.
        places = [*range(BEFORE), *range(end, len(words)), *range(BEFORE, end)]
        order = example.tokens.new_tensor(places)
        named = [words[place] for place in places]
        original.append(Numbered(named, order, order * 0, BEFORE + AFTER))
    return LeakData(original, blank)


def draw_ids(data: tuple[Numbered, Numbered]) -> BookFigure:
    """Draw place over step, a column for each token, one blank beside the other."""
    figure, axes = panels(2, 2, height=5.6, sharex="col", sharey="row")
    titles = ("[MASK]: a blank inside", "[gMASK]: a blank at the end")
    for column, (row, title) in enumerate(zip(data, titles, strict=True)):
        top, bottom = axes[column], axes[column + 2]
        for ax, numbers, colour in (
            (top, row.places, BLUE),
            (bottom, row.steps, ORANGE),
        ):
            ax.axvspan(row.context - 0.5, len(numbers) - 0.5, color=GREY, alpha=0.14)
            ax.step(range(len(numbers)), numbers, where="mid", color=colour, lw=1.5)
            for t, number in enumerate(numbers.tolist()):
                _disc(ax, t, number, str(number), colour)
            ax.set(xlim=(-0.6, len(numbers) - 0.5), yticks=[])
            ax.tick_params(bottom=False)
            ax.spines[:].set_visible(False)
        top.set_title(title)
        top.set_ylim(-0.6, data[0].places.max().item() + 0.6)
        top.tick_params(labelbottom=False)
        bottom.set_ylim(-0.6, data[1].steps.max().item() + 0.6)
        bottom.set_xticks(range(len(row.words)), row.words, rotation=90)
        for t, label in enumerate(bottom.get_xticklabels()):
            label.set_color(INK if t < row.context else ORANGE)
    for ax, words, colour in ((axes[0], "place", BLUE), (axes[2], "step", ORANGE)):
        ax.set_ylabel(words, color=colour, weight="bold", size=SIZE + 1)
    return figure


def draw_leak(data: LeakData) -> BookFigure:
    """Draw the words at their places; answers rise out of the blank, or tear it up."""
    figure, axes = panels(
        2,
        len(ANSWERS),
        height=5.8,
        sharey="row",
        height_ratios=(1.7, 7),
    )
    widest = max(row.places.max().item() for row in data.original)
    tallest = max(row.steps.max().item() for row in data.blank)
    for ax, row, answer in zip(axes, data.original, ANSWERS, strict=False):
        ax.set_title(f"{len(answer)} word{'s' * (len(answer) > 1)} long", size=SIZE + 1)
        _write(ax, row)
        ax.set_ylim(-1.1, 0.6)
    for ax, row in zip(axes[len(ANSWERS) :], data.blank, strict=True):
        _write(ax, row)
        ax.set_ylim(-1.1, tallest + 0.5)
    for ax in axes:
        ax.set(xlim=(-0.7, widest + 0.7), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("original\nplaces", weight="bold")
    axes[len(ANSWERS)].set_ylabel("place across, step up", weight="bold")
    return figure


def _numbered(example: Example, words: Sequence[str], ids: BlankIds) -> Numbered:
    names = (*SPECIAL, *words)
    tokens = example.tokens[None]
    places, steps = prompt_positions(tokens, ids, rows=2)[0]
    context = int(context_lengths(tokens, ids.sop))
    return Numbered([names[i] for i in tokens[0].tolist()], places, steps, context)


def _write(ax: Axes, row: Numbered) -> None:
    """Write words where they stand, a brick for each step, and the places below."""
    for t, word in enumerate(row.words):
        place, step = int(row.places[t]), int(row.steps[t])
        colour = BLUE if t < row.context else ORANGE
        if step:
            brick = Rectangle((place - 1.35, step - 0.43), 2.7, 0.86)
            brick.set(facecolor=to_rgba(colour, 0.05), edgecolor=colour)
            ax.add_patch(brick)
        look: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        ax.text(place, step, word, rotation=0 if step else 90, **look)
        if not step:
            ax.text(place, -0.88, str(place), weight="bold", **look)


def _disc(ax: Axes, x: int, y: int, words: str, colour: str) -> None:
    ax.plot([x], [y], "o", color=colour, markersize=15)
    ax.text(
        x, y, words, ha="center", va="center_baseline", color="white", weight="bold"
    )
