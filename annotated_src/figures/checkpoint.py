"""Pictures of a checkpoint: its bytes, where its tensors lie, and one flipped bit."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    GREY_INK,
    INK,
    ORANGE,
    BookFigure,
    panels,
)
from annotated_src.models.llama import Llama

ROW = 16  # bytes in a row of the dump
# Pale, so that ink can be read on them, and neighbours differ in grey too; in the
# order of a file's parts.
PALE = ("#E3A9C8", "#EEF0F2", "#BBDDF5", "#EBAF6D")
KINDS = {"embed": BLUE, "mlp": GREEN, "self_attn": AMBER, "norm": INK}
SHORT = {"down_proj": "down", "gate_proj": "gate", "up_proj": "up"}
SHORT |= {"k_proj": "k", "o_proj": "o", "q_proj": "q", "v_proj": "v"}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16}


class Part(NamedTuple):
    """A run of bytes with one meaning."""

    name: str
    start: int
    stop: int


class DumpData(NamedTuple):
    """A file's bytes, its parts in order, and what its numbers are."""

    content: bytes
    parts: tuple[Part, ...]
    numbers: tuple[tuple[Part, float], ...]  # each number's bytes, named by its tensor


def dump_data(content: bytes) -> DumpData:
    """Divide a small safetensors file, of F32 and BF16, into its parts."""
    start = 8 + int.from_bytes(content[:8], "little")
    parts, numbers = [Part("length", 0, 8), Part("header", 8, start)], []
    for name, entry in json.loads(content[8:start]).items():
        first, last = (start + offset for offset in entry["data_offsets"])
        parts.append(Part(name, first, last))
        dtype = TORCH[entry["dtype"]]
        values = torch.frombuffer(bytearray(content[first:last]), dtype=dtype)
        for i, value in enumerate(values.tolist()):
            place = first + i * dtype.itemsize
            numbers.append((Part(name, place, place + dtype.itemsize), value))
    return DumpData(content, tuple(parts), tuple(numbers))


def draw_dump(data: DumpData) -> BookFigure:
    """Draw every byte as a cell: its two hexadecimal digits, and what they mean."""
    rows = -(-len(data.content) // ROW)
    figure, (ax,) = panels(height=0.56 * rows + 0.8)
    for part, fill in zip(data.parts, PALE, strict=False):
        for place in range(part.start, part.stop):
            _byte(ax, place, data.content[place], fill, part.name == "header")
    for part, value in data.numbers:
        row, column = divmod(part.start, ROW)
        middle = column + (part.stop - part.start) / 2
        words = f"{value:.5f}".rstrip("0").rstrip(".").replace("-", "−")
        ax.text(middle, row + 0.72, words, ha="center", va="center")
        if column:
            ax.plot([column, column], [row + 0.05, row + 0.95], color=GREY, lw=1)
    for row in range(rows):
        at = (-0.25, row + 0.5)
        ax.text(*at, str(row * ROW), ha="right", va="center", color=GREY_INK)
    left = 0.0
    for part, fill in zip(data.parts, PALE, strict=False):
        words = f"{part.name}: {part.stop - part.start} bytes"
        box = Rectangle((left, -0.78), 0.5, 0.5, facecolor=fill, edgecolor=GREY, lw=0.6)
        ax.add_patch(box)
        ax.text(left + 0.68, -0.52, words, va="center")
        left += 1.0 + 0.255 * len(words)
    ax.set(xlim=(-1.1, ROW), ylim=(rows, -0.95))
    ax.axis("off")
    return figure


def _byte(ax: Axes, place: int, value: int, fill: str, is_text: bool) -> None:
    row, column = divmod(place, ROW)
    box = Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="white", lw=0.8)
    ax.add_patch(box)
    small: dict[str, Any] = {"ha": "center", "va": "center", "family": "monospace"}
    ax.text(column + 0.5, row + 0.28, f"{value:02x}", **small)
    if is_text:
        sign = "␣" if value == ord(" ") else chr(value)
        ax.text(column + 0.5, row + 0.68, sign, size=14, weight="bold", **small)


class MapData(NamedTuple):
    """Where each tensor of a file lies, in bytes behind the header."""

    names: tuple[str, ...]
    starts: Int[Tensor, "tensors"]
    stops: Int[Tensor, "tensors"]
    row_bytes: int  # of one layer, so that each layer fills a row of the picture


def map_data(header: Mapping[str, Any]) -> MapData:
    """Take the tensors' places from a header, in the order of the bytes."""
    entries = [
        (entry["data_offsets"], name)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    offsets, names = zip(*sorted(entries), strict=True)
    starts, stops = torch.tensor(offsets).T
    in_layer = torch.tensor([name.startswith("model.layers.0.") for name in names])
    return MapData(names, starts, stops, int((stops - starts)[in_layer].sum()))


def draw_map(data: MapData) -> BookFigure:
    """Draw the file as a page that is read like text, a layer to a row.

    A layer that does not follow the one above by number is bold.
    """
    rows = -(-int(data.stops[-1]) // data.row_bytes)
    figure, (ax,) = panels(height=0.2 * rows + 0.7)
    places = zip(data.names, data.starts.tolist(), data.stops.tolist(), strict=True)
    before = 0  # the layer of the row above
    for name, start, stop in places:
        colour = next(colour for kind, colour in KINDS.items() if kind in name)
        for row in range(start // data.row_bytes, -(-stop // data.row_bytes)):
            _piece(ax, row, start / data.row_bytes, stop / data.row_bytes, colour)
        middle = (start + stop) / 2 / data.row_bytes
        _, _, layer, *rest = [*name.split("."), "", ""]
        if rest[:2] == ["mlp", "down_proj"]:
            jumps = int(layer) not in (0, before + 1)
            style = {"weight": "bold", "color": ORANGE} if jumps else {}
            at, before = (-0.015, int(middle) + 0.5), int(layer)
            ax.text(*at, f"layer {layer}", style, ha="right", va="center")
        if layer == "0" and rest[1] in SHORT:
            ink = INK if colour == AMBER else "white"
            at, words = (middle % 1, int(middle) + 0.47), SHORT[rest[1]]
            ax.text(*at, words, color=ink, ha="center", va="center")
    share = float(data.stops[0] - data.starts[0]) / float(data.stops[-1])
    words = f"embedding: {share:.0%} of the file"
    ax.text(0.5, 4, words, color="white", size=14, ha="center", va="center")
    for x, words in ((0.375, "feed-forward"), (0.875, "attention")):
        ax.text(x, rows + 0.7, words, ha="center", va="center")
    ax.set(xlim=(-0.16, 1.01), ylim=(rows + 1.3, -0.2))
    megabytes = data.row_bytes / 1e6
    ax.set_title(f"One row is {megabytes:.1f} MB, read from left to right", x=0.57)
    ax.axis("off")
    return figure


def _piece(ax: Axes, row: int, start: float, stop: float, colour: str) -> None:
    """Draw what of a tensor falls into one row; where it begins, leave a thin line."""
    left, right = max(start - row, 0.0), min(stop - row, 1.0)
    if colour == INK:  # a norm: 2 KB in a row of 14 MB would not be seen
        ax.plot([left, left], [row, row + 1], color=INK, lw=1.6, zorder=3)
        return
    top = 0.08 if colour != BLUE or row == 0 else 0.0
    height = 1.0 - top if colour == BLUE else 0.84
    box = Rectangle((left, row + top), right - left, height, facecolor=colour, lw=0)
    ax.add_patch(box)
    if start > row and colour != BLUE:
        ax.plot([left, left], [row + 0.08, row + 0.92], color="white", lw=0.8)


class FlipData(NamedTuple):
    """What a model answers when one bit of one weight is the other way round."""

    weight: float
    is_set: Bool[Tensor, "32"]  # item i is bit i; bit 31 is the sign
    flipped: Float[Tensor, "32"]  # the weight's new value
    change: Float[Tensor, "32"]  # the largest change of a logit of the next token
    answers: Int[Tensor, "32"]  # the id of the next token
    lead: float  # of the right model's next token over the one behind it


def flip_data(
    model: Llama, tokens: Int[Tensor, "1 T"], name: str, index: Sequence[int]
) -> FlipData:
    """Flip each of the 32 bits of a float32 weight in turn, and put it back.

    The model must run as it did when the weight was read: no dropout, one device.
    """
    with torch.no_grad():
        number = dict(model.named_parameters())[name][tuple(index)]
        pattern = number.view(torch.int32)
        before, weight = pattern.clone(), number.item()
        right = model(tokens)[0, -1]
        best = right.topk(2).values
        flipped, change, answers = [], [], []
        try:
            for bit in range(32):
                pattern.copy_(before ^ _bit(bit))
                logits = model(tokens)[0, -1]
                flipped.append(number.item())
                change.append((logits - right).abs().max().item())
                answers.append(logits.argmax().item())
        finally:
            pattern.copy_(before)
    is_set = torch.tensor([bool(before & _bit(bit)) for bit in range(32)])
    return FlipData(
        weight,
        is_set,
        torch.tensor(flipped, dtype=torch.float64),
        torch.tensor(change, dtype=torch.float64),
        torch.tensor(answers),
        (best[0] - best[1]).item(),
    )


def _bit(number: int) -> int:
    return 1 << number if number < 31 else -(1 << 31)  # int32 has a sign


def draw_flips(data: FlipData, words: Mapping[int, str]) -> BookFigure:
    """Draw how far the logits move for each bit; words says what other answers are."""
    figure, (ax,) = panels(height=4.7)
    low, high = 1e-5, 3e3
    right = int(data.answers.mode().values)
    for bit in range(32):
        change, other = float(data.change[bit]), int(data.answers[bit]) != right
        x, colour = 31 - bit, ORANGE if other else BLUE
        ax.bar(x, min(max(change, low), high / 12), 0.8, color=colour)
        is_set = f"{data.is_set[bit]:d}"
        ax.text(x, low / 1.5, is_set, ha="center", va="top", weight="bold")
        label = words[bit] if other else ""
        if change > high / 12:  # an arrow for a bar that leaves the picture
            digit, power = f"{change:.0e}".split("e+")
            label += f" (${digit}\\cdot10^{{{power}}}$)"
            ax.plot(x, high / 9, marker="^", color=colour, markersize=8)
            ax.text(x + 1, high / 12, label, color=colour, va="center")
        else:
            ax.text(x, change * 1.4, label, color=colour, ha="center")
    ax.axhline(data.lead, color=INK, lw=1, ls=(0, (4, 3)))
    lead = f"the lead of “Paris”: {data.lead:.1f}"
    ax.text(31.4, data.lead * 1.25, lead, ha="right")
    for first, last, word in ((0, 0, "sign"), (1, 8, "exponent"), (9, 31, "fraction")):
        _brace(ax, first, last, low / 9, word)
    ax.set_yscale("log")
    ax.set(ylim=(low, high), xlim=(-0.8, 31.6), xticks=[])
    ax.set_ylabel("largest change of a logit")
    ax.set_title("One bit of one weight the other way round", loc="left")
    return figure


def _brace(ax: Axes, first: int, last: int, y: float, word: str) -> None:
    """Draw a line below some bits, and below it their name."""
    ax.plot([first - 0.38, last + 0.38], [y, y], color=INK, lw=1.5, clip_on=False)
    alone = first == last
    x = first - 0.4 if alone else (first + last) / 2
    ax.text(x, y / 1.4, word, ha="left" if alone else "center", va="top")
