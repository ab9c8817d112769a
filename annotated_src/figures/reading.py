"""Pictures of what a decoder computes: a guess after every token, and causality."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.figures.style import AMBER, GREY_INK, BookFigure, ink_on, panels
from annotated_src.tokenizer import TextTokenizer


class GuessesData(NamedTuple):
    """After each token of a text: the likeliest next ones, and the one that came."""

    words: tuple[str, ...]  # those read, then the one that came last
    guesses: tuple[tuple[str, ...], ...]  # best first, a row for each token read
    probabilities: Float[Tensor, "tokens best"]


def token_label(tokenizer: TextTokenizer, token: int) -> str:
    """Write a token so that its spaces and line ends can be seen."""
    text = tokenizer.tokenizer.decode([token], skip_special_tokens=False)
    for invisible, mark in ((" ", "·"), ("\n", "↵"), ("\xa0", "nbsp")):
        text = text.replace(invisible, mark)
    return text


def guesses_data(
    model: Any, tokenizer: TextTokenizer, text: str, best: int = 5
) -> GuessesData:
    """Run the text once, and keep the best guesses at every token but the last."""
    tokens = tokenizer.encode(text)
    with torch.no_grad():
        top = model(tokens)[0, :-1].softmax(-1).topk(best)
    return GuessesData(
        tuple(token_label(tokenizer, int(i)) for i in tokens[0]),
        tuple(
            tuple(token_label(tokenizer, int(i)) for i in row) for row in top.indices
        ),
        top.values,
    )


def draw_guesses(data: GuessesData) -> BookFigure:
    """Draw one panel a token read: bars of the guesses, amber where one came true."""
    figure, axes = panels(1, len(data.guesses), height=2.9, sharex=True)
    for i, (ax, guesses) in enumerate(zip(axes, data.guesses, strict=True)):
        came = data.words[i + 1]
        for y, (word, share) in enumerate(
            zip(guesses, data.probabilities[i].tolist(), strict=True)
        ):
            colour = AMBER if word == came else "#BBDDF2"
            ax.barh(y, share, height=0.84, color=colour)
            weight = "bold" if word == came else "normal"
            ax.text(0.02, y, word, va="center", weight=weight)
            ax.text(1.03, y, f"{share:.0%}", va="center", ha="right")
        ax.set_title(data.words[i], loc="left", weight="bold")
        ax.set(xlim=(0, 1.06), ylim=(len(guesses) - 0.5, -0.5), xticks=[], yticks=[])
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(side == "left")
    return figure


class NoticeData(NamedTuple):
    """Swap one token at a time: how far does the guess after each token move?"""

    words: tuple[str, ...]
    swaps: tuple[str, ...]  # what stands in for each word, one at a time
    moved: Float[Tensor, "swaps tokens"]  # share of the probability that changes word
    says: tuple[str, ...]  # the best next word after the whole, swapped text


def notice_data(
    model: Any, tokenizer: TextTokenizer, text: str, swaps: Sequence[str]
) -> NoticeData:
    """Run the text, and once more for each word with that word swapped.

    The distance is the total variation: half the sum of the absolute differences.

    Raises:
        ValueError: a swap is not one token, or there are not as many as tokens.
    """
    tokens = tokenizer.encode(text)
    others = [tokenizer.encode(swap) for swap in swaps]
    if [other.shape[1] for other in others] != [1] * tokens.shape[1]:
        raise ValueError(f"need one token for each of {tokens.shape[1]}, got {swaps}")
    batch = tokens.repeat(len(others), 1)
    for i, other in enumerate(others):
        batch[i, i] = other[0, 0]
    with torch.no_grad():
        before = model(tokens).softmax(-1)
        after = torch.cat([model(row[None]) for row in batch]).softmax(-1)
    return NoticeData(
        tuple(token_label(tokenizer, int(i)) for i in tokens[0]),
        tuple(token_label(tokenizer, int(other)) for other in others),
        (after - before).abs().sum(-1) / 2,
        tuple(token_label(tokenizer, int(i)) for i in after[:, -1].argmax(-1)),
    )


NOTICED = LinearSegmentedColormap.from_list(
    "noticed", ["#EAF3FA", "#8CC6E8", "#0066A3"]
)


def draw_notice(data: NoticeData) -> BookFigure:
    """Draw a square of numbers: empty where a swap cannot be seen, blue where it is."""
    size = len(data.words)
    figure, (ax,) = panels(height=0.52 * size + 1.25)
    for row in range(size):
        for column in range(size):
            _notice_cell(ax, row, column, float(data.moved[row, column]))
        swap = f"{data.words[row]} → {data.swaps[row]}"
        ax.text(-0.15, row + 0.5, swap, ha="right", va="center")
        at = (size + 0.15, row + 0.5)
        ax.text(*at, data.says[row], va="center", weight="bold")
    for column, word in enumerate(data.words):
        ax.text(column + 0.5, -0.15, word, ha="center", va="bottom")
    for x, words, side in (
        (-0.15, "swap one word", "right"),
        (size / 2, "how much of the guess after this word moves", "center"),
        (size + 0.15, "guess at the end", "left"),
    ):
        ax.text(x, -0.72, words, ha=side, va="bottom", color=GREY_INK)
    ax.set(xlim=(-0.02, size + 0.02), ylim=(size + 0.02, -1.1), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _notice_cell(ax: Axes, row: int, column: int, moved: float) -> None:
    seen = column >= row
    box = Rectangle(
        (column + 0.03, row + 0.05),
        0.94,
        0.9,
        facecolor=NOTICED(moved) if seen else "white",
        edgecolor="none" if seen else "#D5DADF",
        linewidth=0.8,
    )
    ax.add_patch(box)
    ax.text(
        column + 0.5,
        row + 0.52,
        f"{moved:.0%}" if seen else "0" if moved == 0 else f"{moved:.0e}",
        ha="center",
        va="center",
        color=ink_on(NOTICED(moved)) if seen else GREY_INK,
    )
