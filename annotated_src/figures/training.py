"""A model that learns: its loss beside what counting knows, and its texts, coloured."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREY,
    INK,
    ORANGE,
    BookFigure,
    panels,
)
from annotated_src.models.llama import Llama
from annotated_src.scoring import token_log_probs
from annotated_src.tokenizer import TextTokenizer

COLUMNS, LINES = 44, 5  # characters of a text that is drawn
MOST_BITS = 10.0  # where the colours end
# The last is as dark as it may be for ink to be read on it.
SHADES = ((0.0, "#FFFFFF"), (0.7, AMBER), (1.0, "#DE6B12"))
SURPRISE = LinearSegmentedColormap.from_list("surprise", SHADES)


class Baselines(NamedTuple):
    """Nats a token that a model pays on a text, if it knows no more than counts."""

    uniform: float  # the size of the vocabulary
    unigram: float  # how frequent each token is
    bigram: float  # and what follows what


def baselines(
    train: Int[Tensor, "train"], held_out: Int[Tensor, "B T"], vocab_size: int
) -> Baselines:
    """Count in one text, pay on windows of another, as a model does in them.

    Every token is counted once more than it is there, so that none costs infinity. A
    pair seen c times after a token seen n times has (c + 20 p) / (n + 20), p being the
    share of its second token: pairs never seen are left to the frequencies.
    """
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    shares = counts / counts.sum()
    pairs = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    ones = torch.ones(len(train) - 1, dtype=torch.float64)
    pairs.index_put_((train[:-1], train[1:]), ones, accumulate=True)
    follows = (pairs + 20 * shares) / (pairs.sum(dim=1, keepdim=True) + 20)
    return Baselines(
        math.log(vocab_size),
        -shares[held_out[:, 1:]].log().mean().item(),
        -follows[held_out[:, :-1], held_out[:, 1:]].log().mean().item(),
    )


def held_out_loss(model: Llama, windows: Int[Tensor, "B T"]) -> float:
    """Nats a token on text that was not trained on."""
    return -token_log_probs(model, windows).mean().item()


class LossData(NamedTuple):
    """A training run in nats a token."""

    train: Float[Tensor, "steps"]  # of each batch, before the step
    marks: Int[Tensor, "marks"]  # after how many steps held-out text was read
    held_out: Float[Tensor, "marks"]
    counted: Baselines
    bytes_per_token: float


def loss_data(
    losses: Sequence[float],
    held_out: Mapping[int, float],
    counted: Baselines,
    bytes_per_token: float,
) -> LossData:
    """Put what a run has noted into tensors."""
    return LossData(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(list(held_out)),
        torch.tensor(list(held_out.values()), dtype=torch.float64),
        counted,
        bytes_per_token,
    )


def draw_loss(data: LossData) -> BookFigure:
    """Draw both losses over the steps, on a logarithmic axis; bits on the right."""
    figure, (ax,) = panels(height=4.6)
    steps = len(data.train)
    names = ("knows nothing", "knows frequencies", "knows pairs")
    for name, height in zip(names, data.counted, strict=True):
        ax.axhline(height, color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=1)
        ax.text(1, height - 0.06, name, color=INK, va="top")
    ax.plot(range(1, steps + 1), data.train, color=AMBER, lw=1, zorder=2)
    shown = data.marks > 0
    marks, held_out = data.marks[shown], data.held_out[shown]
    ax.plot(marks, held_out, "o-", color=BLUE, ms=5, zorder=3)
    ax.set_xscale("log")
    ends = [x for x in (1, 10, 100, 1000) if x < steps / 1.5]
    ax.set_xticks([*ends, steps], [str(x) for x in (*ends, steps)])
    ax.minorticks_off()
    ax.set(xlim=(0.93, steps * 1.08), ylim=(2, None), xlabel="steps")
    ax.set_ylabel("nats a token")
    x, y = marks[len(marks) // 2].item(), held_out[len(marks) // 2].item()
    lowest = data.train[-20:].mean().item()
    ax.text(x * 1.1, y, "held out", color=BLUE, va="bottom")
    ax.text(steps / 2.6, lowest, "training", color=ORANGE, ha="right", va="center")
    per_bit = math.log(2) * data.bytes_per_token
    right = ax.secondary_yaxis(
        "right", functions=(_times(1 / per_bit), _times(per_bit))
    )
    right.set_ylabel("bits a byte")
    return figure


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda y: y * factor


class Reading(NamedTuple):
    """A text in the pieces of its tokens, and how surprising each piece was."""

    pieces: list[str]
    bits: list[float]


def reading_data(
    model: Llama, tokenizer: TextTokenizer, ids: Int[Tensor, "1 T"]
) -> Reading:
    """Let the model read; the first token, which nothing precedes, is left out."""
    bits = -token_log_probs(model, ids)[0].double() / math.log(2)
    pieces = [visible(tokenizer.decode([i])) for i in ids[0, 1:].tolist()]
    return Reading(pieces, bits.tolist())


def visible(piece: str) -> str:
    """Give every character one column: line ends, the text's end and odd bytes too."""
    if not piece:
        return "∎"
    known = {"\n": "↵", "\N{REPLACEMENT CHARACTER}": "·"}
    return "".join(known.get(c, c if c.isprintable() else "·") for c in piece)


def draw_readings(readings: Mapping[str, Reading]) -> BookFigure:
    """Draw texts, each character on a ground that tells how surprising it was."""
    height = 0.4 + len(readings) * (0.29 * LINES + 0.38)
    figure, axes = panels(len(readings), 1, height=height)
    scale = Normalize(0, MOST_BITS)
    for ax, (title, reading) in zip(axes, readings.items(), strict=True):
        _draw_reading(ax, reading, scale)
        ax.set_title(title, loc="left")
    bar = figure.colorbar(
        ScalarMappable(scale, SURPRISE),
        ax=axes,
        location="bottom",
        aspect=40,
        pad=0.01,
        shrink=0.98,
    )
    bar.set_ticks([0, 5, 10], labels=["expected", "5 bits", "10 bits or more"])
    first, _, last = bar.ax.get_xticklabels()
    first.set(ha="left")
    last.set(ha="right")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _draw_reading(ax: Axes, reading: Reading, scale: Normalize) -> None:
    places = [
        (character, bits)
        for piece, bits in zip(*reading, strict=True)
        for character in piece
    ]
    for i, (character, bits) in enumerate(places[: COLUMNS * LINES]):
        line, column = divmod(i, COLUMNS)
        ground = SURPRISE(scale(min(bits, MOST_BITS)))
        ax.add_patch(Rectangle((column, line), 1.02, 0.94, color=ground, lw=0))
        if character != " ":
            ax.text(
                column + 0.5,
                line + 0.5,
                character,
                family="monospace",
                size=16,
                ha="center",
                va="center_baseline",
            )
    ax.set(xlim=(0, COLUMNS), ylim=(LINES, 0), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
