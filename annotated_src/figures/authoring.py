"""Four decoders side by side: where sources, blocks and sizes part."""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from annotated_src.figures.llama import part_of
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PALE_BLUE,
    SIZE,
    BookFigure,
    panels,
)

MODELS = re.compile(r"\b(Llama|Gemma|Phi|ChatGLM)(?=(Config|Block)?\b)")


class SourceDiff:
    """What must change in one class or function to make it another.

    Docstrings and comments on lines of their own are left out, and so are the models'
    own names, such as Gemma in GemmaBlock, where both sources have them.
    """

    def __init__(self, old: Any, new: Any) -> None:
        before, after = code_lines(old), code_lines(new)
        found = list(difflib.unified_diff(before, after, lineterm="", n=1))
        self.lines = [" ⋮" if line.startswith("@@") else line for line in found[3:]]
        self.removed = sum(line.startswith("-") for line in self.lines)
        self.added = sum(line.startswith("+") for line in self.lines)
        self.total = len(before)

    def __repr__(self) -> str:
        return f"{self.added} lines new, {self.removed} gone"

    def _repr_markdown_(self) -> str:
        return "```diff\n" + "\n".join(self.lines) + "\n```"


def code_lines(item: Any) -> list[str]:
    """Read the code of a class or function: no docstrings, comments or blank lines.

    A short bracket over three lines becomes one: that names are longer is no change.
    """
    text = textwrap.dedent(inspect.getsource(item))
    lines = MODELS.sub("Model", text).splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            for number in range(first.lineno, (first.end_lineno or 0) + 1):
                lines[number - 1] = ""
    kept = "\n".join(line for line in lines if line.strip() and line.strip()[0] != "#")
    over_three = re.compile(r"^(.*\()\n +(.*[^,\n])\n +(\).*)$", re.M)
    return over_three.sub(_joined, kept).splitlines()


def _joined(found: re.Match[str]) -> str:
    line = "".join(found.groups())
    return line if len(line) < 96 else found[0]


# ---------------------------------------------------------------- blocks


class Row(NamedTuple):
    """One model of the picture, its parts as words, in the order of computation."""

    name: str
    embedding: str
    norms: str
    attention: str
    ffn: str
    wiring: str  # "sequential", "parallel" or "after the norm"
    head: str


ROWS = (
    Row("Llama", "embed", "RMS\nNorm", "attention", "SwiGLU", "sequential", "head"),
    Row(
        "Gemma",
        "embed\n× √D",
        "RMS\n1 + w",
        "attention",
        "GEGLU",
        "sequential",
        "embed\nagain",
    ),
    Row(
        "Phi-2",
        "embed",
        "Layer\nNorm",
        "attention\n40 % turn",
        "GELU,\nno gate",
        "parallel",
        "head\n+ bias",
    ),
    Row(
        "ChatGLM-6B",
        "embed",
        "Layer\nNorm",
        "attention\ntwo ropes",
        "GELU,\nno gate",
        "after the norm",
        "embed\nagain",
    ),
)


def block_by_row(
    row: Row, norms: list[Any], attention: Any, ffn: Any, x: Tensor, alpha: float
) -> Tensor:
    """Compute a block as its row is drawn; norms has one norm or two."""
    if row.wiring == "parallel":
        y = norms[0](x)
        return x + (attention(y) + ffn(y))
    for norm, branch in zip(norms, (attention, ffn), strict=True):
        y = norm(x)
        x = alpha * y + branch(y) if row.wiring == "after the norm" else x + branch(y)
    return x


def draw_blocks() -> BookFigure:
    """Draw the rows above each other, lit where a part is not Llama's."""
    figure, axes = panels(len(ROWS), 1, height=7.8)
    for ax, row in zip(axes, ROWS, strict=True):
        ax.axis("off")
        ax.set(xlim=(-0.55, 7.89), ylim=(-0.45, 1.95))
        ax.text(-0.5, 1.72, row.name, weight="bold", size=SIZE + 1, va="center")
        ax.plot([0, 7.3], [0, 0], color=INK, lw=4, solid_capstyle="butt", zorder=1)
        _box(ax, 0.0, 0.0, row, "embedding")
        _box(ax, 6.26, 0.0, row, "norms")
        _box(ax, 7.34, 0.0, row, "head")
        if row.wiring == "parallel":
            _parallel(ax, row)
        else:
            _in_turn(ax, row)
    return figure


def _in_turn(ax: Axes, row: Row) -> None:
    late = row.wiring == "after the norm"
    for start, branch in ((0.6, "attention"), (3.18, "ffn")):
        fork, end = start + (1.14 if late else 0.0), start + 2.38
        _line(ax, [fork, fork, end, end], [0.0, 1.1, 1.1, 0.0], late)
        _box(ax, start + 0.6, 0.0 if late else 1.1, row, "norms")
        _box(ax, start + 1.72, 1.1, row, branch)
        if late:
            middle = (fork + end) / 2
            ax.text(middle, 0.13, "× α", color=ORANGE, ha="center")
        _plus(ax, end)


def _parallel(ax: Axes, row: Row) -> None:
    _line(ax, [1.3, 1.3, 2.7], [0.0, 0.95, 0.95], lit=True)
    _line(ax, [2.7, 2.7, 4.4, 4.4, 2.7, 2.7], [0.95, 1.45, 1.45, 0.5, 0.5, 0.95], True)
    _line(ax, [4.4, 4.8, 4.8], [0.95, 0.95, 0.0], lit=True)
    _box(ax, 1.95, 0.95, row, "norms")
    _box(ax, 3.55, 1.45, row, "attention")
    _box(ax, 3.55, 0.5, row, "ffn")
    _plus(ax, 4.8)


def _line(ax: Axes, xs: list[float], ys: list[float], lit: bool) -> None:
    ax.plot(xs, ys, color=ORANGE if lit else INK, lw=1.5, zorder=1)


def _box(ax: Axes, x: float, y: float, row: Row, part: str) -> None:
    words, height = getattr(row, part), 0.72
    width = 1.08 if part in ("attention", "ffn") else 0.98
    lit = words != getattr(ROWS[0], part)
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    fill, ink = (ORANGE, "white") if lit else ("white", INK)
    ax.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=shape, fc=fill, ec=INK, lw=1.2, zorder=3
        )
    )
    ax.text(x, y, words, ha="center", va="center", color=ink, zorder=4)


def _plus(ax: Axes, x: float) -> None:
    ax.plot([x], [0], marker="o", ms=15, mfc="white", mec=INK, mew=1.2, zorder=3)
    ax.text(x, 0, "+", ha="center", va="center_baseline", size=SIZE + 2, zorder=4)


# ---------------------------------------------------------------- sizes

PARTS = ("embedding and head", "attention", "feed-forward", "norms")


class SizeData(NamedTuple):
    """What each model holds: its numbers, part by part, and its keys and values."""

    names: tuple[str, ...]
    counts: Int[Tensor, "models parts"]
    cached: Int[Tensor, "models"]  # numbers in the cache, per token

    @property
    def totals(self) -> Int[Tensor, "models"]:
        """All parameters of each model."""
        return self.counts.sum(-1)


def size_data(models: Mapping[str, tuple[Any, Any]]) -> SizeData:
    """Build each (class, config) without memory, and count its tensors by part."""
    counts = torch.zeros(len(models), len(PARTS), dtype=torch.int64)
    cached = []
    for row, (kind, config) in zip(counts, models.values(), strict=True):
        with torch.device("meta"):
            model = kind(config)
        for name, weight in model.named_parameters():
            row[PARTS.index(part_of(name))] += weight.numel()
        kv_heads = getattr(config, "num_kv_heads", config.num_heads)
        cached.append(2 * config.num_layers * kv_heads * config.head_dim)
    return SizeData(tuple(models), counts, torch.tensor(cached))


def draw_sizes(data: SizeData) -> BookFigure:
    """Draw the parameters as bars cut into parts, and below them the cache's growth."""
    figure, (above, below) = panels(2, 1, height=6.2)
    ys = range(len(data.names))
    left = [0.0] * len(data.names)
    for part, colour in zip(range(3), (BLUE, AMBER, PALE_BLUE), strict=True):
        widths = (data.counts[:, part] / 1e9).tolist()  # norms are too thin to see
        above.barh(ys, widths, left=left, color=colour, height=0.62, label=PARTS[part])
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for y, total in zip(ys, data.totals.tolist(), strict=True):
        above.text(total / 1e9 + 0.08, y, f"{total / 1e9:.2f}", va="center")
    above.set_title("Parameters, in billions", loc="left")
    above.legend(loc="upper right", bbox_to_anchor=(1.01, 1.03))
    kilobytes = (data.cached * 2 / 1000).tolist()  # two bytes a number
    below.barh(ys, kilobytes, color=GREEN, height=0.62)
    for y, size in zip(ys, kilobytes, strict=True):
        below.text(size + 5, y, f"{size:.0f}", va="center")
    below.set_title("Keys and values of a token, in kB, 2 bytes a number", loc="left")
    for ax, most in ((above, 10.4), (below, 520)):
        ax.set(xlim=(0, most), ylim=(len(data.names) - 0.5, -0.5), xticks=[])
        ax.set_yticks(ys, data.names)
        ax.tick_params(length=0)
        ax.spines["bottom"].set_visible(False)
    return figure
