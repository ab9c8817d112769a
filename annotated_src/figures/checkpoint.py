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
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    BookFigure,
    panels,
)
from annotated_src.models.llama import Llama

ROW = 16  # bytes in a row of the dump
# Pale, so that ink can be read on them; in the order of a file's parts.
PALE = ("#F4D9E8", "#E9ECEF", "#CFE4F5", "#F9DCC4")
KINDS = {"embed": BLUE, "mlp": GREEN, "self_attn": ORANGE, "norm": INK}
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
    figure, (ax,) = panels(width=6.2, height=0.5 * rows + 0.7)
    for part, fill in zip(data.parts, PALE, strict=False):
        for place in range(part.start, part.stop):
            _byte(ax, place, data.content[place], fill, part.name == "header")
    for part, value in data.numbers:
        row, column = divmod(part.start, ROW)
        middle = column + (part.stop - part.start) / 2
        words = f"{value:.5f}".rstrip("0").rstrip(".")
        ax.text(middle, row + 0.72, words, ha="center", va="center", size=11)
        if column:
            ax.plot([column, column], [row + 0.05, row + 0.95], color=GREY, lw=1)
    for row in range(rows):
        ax.text(
            -0.25, row + 0.5, str(row * ROW), ha="right", va="center", color="#59626D"
        )
    left = 0.0
    for part, fill in zip(data.parts, PALE, strict=False):
        words = f"{part.name}: {part.stop - part.start} bytes"
        box = Rectangle((left, -0.78), 0.5, 0.5, facecolor=fill, edgecolor=GREY, lw=0.6)
        ax.add_patch(box)
        ax.text(left + 0.68, -0.52, words, va="center", size=10.5)
        left += 1.0 + 0.27 * len(words)
    ax.set(xlim=(-1.1, ROW), ylim=(rows, -0.95))
    ax.axis("off")
    return figure


def _byte(ax: Axes, place: int, value: int, fill: str, is_text: bool) -> None:
    row, column = divmod(place, ROW)
    box = Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="white", lw=0.8)
    ax.add_patch(box)
    small: dict[str, Any] = {"ha": "center", "va": "center", "family": "monospace"}
    size = 9.5 if is_text else 10.5
    ax.text(column + 0.5, row + 0.28, f"{value:02x}", size=size, **small)
    if is_text:
        sign = "␣" if value == ord(" ") else chr(value)
        ax.text(column + 0.5, row + 0.68, sign, size=13, weight="bold", **small)


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
    """Draw the file as a page that is read like text, a layer to a row."""
    rows = -(-int(data.stops[-1]) // data.row_bytes)
    figure, (ax,) = panels(width=6.2, height=0.185 * rows + 0.6)
    places = zip(data.names, data.starts.tolist(), data.stops.tolist(), strict=True)
    for name, start, stop in places:
        colour = next(colour for kind, colour in KINDS.items() if kind in name)
        for row in range(start // data.row_bytes, -(-stop // data.row_bytes)):
            _piece(ax, row, start / data.row_bytes, stop / data.row_bytes, colour)
        middle = (start + stop) / 2 / data.row_bytes
        _, _, layer, *rest = [*name.split("."), "", ""]
        if rest[:2] == ["mlp", "down_proj"]:
            words, y = f"layer {layer}", int(middle) + 0.5
            ax.text(-0.015, y, words, ha="right", va="center", size=9.5)
        if layer == "0" and rest[1] in SHORT:
            ink = {"color": "white", "size": 9.5, "ha": "center", "va": "center"}
            ax.text(middle % 1, int(middle) + 0.5, SHORT[rest[1]], **ink)
    share = float(data.stops[0] - data.starts[0]) / float(data.stops[-1])
    words = f"embedding: {share:.0%} of the file"
    ax.text(0.5, 4, words, color="white", size=14, ha="center", va="center")
    under = {"y": rows + 0.7, "ha": "center", "va": "center", "size": 11}
    ax.text(x=0.375, s="feed-forward", color=GREEN, **under)
    ax.text(x=0.875, s="attention", color=ORANGE, **under)
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
    figure, (ax,) = panels(width=6.2, height=4.3)
    low, high = 1e-5, 3e3
    right = int(data.answers.mode().values)
    for bit in range(32):
        colour = PINK if bit == 31 else ORANGE if bit > 22 else BLUE
        change = float(data.change[bit])
        ax.bar(31 - bit, min(max(change, low), high / 12), 0.8, color=colour)
        ink: dict[str, Any] = {"ha": "center", "va": "top", "weight": "bold"}
        ax.text(
            31 - bit, low / 1.5, f"{data.is_set[bit]:d}", size=10.5, color=colour, **ink
        )
        label = "" if int(data.answers[bit]) == right else words[bit]
        if change > high / 12:  # an arrow for a bar that leaves the picture
            digit, power = f"{change:.0e}".split("e+")
            label += f" (${digit}\\cdot10^{{{power}}}$)"
            ax.plot(31 - bit, high / 9, marker="^", color=colour, markersize=8)
            ax.text(32 - bit, high / 12, label, size=11, va="center")
        else:
            ax.text(31 - bit, change * 1.4, label, size=11, ha="center")
    ax.axhline(data.lead, color=INK, lw=1, ls=(0, (4, 3)))
    lead = f"the lead of “Paris”: {data.lead:.1f}"
    ax.text(31.4, data.lead * 1.25, lead, ha="right", size=11)
    for x, word, colour in ((-0.4, "sign", PINK), (3.2, "exponent", ORANGE)):
        ax.text(x, low / 8, word, color=colour, size=11.5, ha="left", va="top")
    ax.text(20, low / 8, "fraction", color=BLUE, size=11.5, ha="center", va="top")
    ax.set_yscale("log")
    ax.set(ylim=(low, high), xlim=(-0.8, 31.6), xticks=[])
    ax.set_ylabel("largest change of a logit")
    ax.set_title("One bit of one weight the other way round", loc="left")
    return figure
