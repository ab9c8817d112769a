"""Record which functions of a package run, and picture their source at one scale."""

import ast
import importlib
import inspect
import linecache
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from matplotlib.collections import LineCollection

from annotated_src.figures.style import BLUE, ORANGE, WIDTH, BookFigure, panels

CallPath = tuple[str, ...]  # from the outermost function to the one that was called


class Record(NamedTuple):
    """What ran: each way to reach a function, how often, and the function's code."""

    answer: Any
    counts: dict[CallPath, int]  # in the order of the first call
    codes: dict[CallPath, CodeType]

    def functions(self) -> list[CodeType]:
        """List each function once, in the order of its first call."""
        return list(dict.fromkeys(self.codes.values()))

    def calls(self, name: str) -> int:
        """Count the calls of all functions of this qualified name."""
        return sum(n for path, n in self.counts.items() if path[-1] == name)


def record(package: str, run: Callable[[], Any]) -> Record:
    """Call run, and note each call of a function of the package while it runs.

    Lambdas and comprehensions are part of the function that they stand in. A generator
    counts when it starts, not each time that it goes on.
    """
    (folder,) = importlib.import_module(package).__path__
    counts: Counter[CallPath] = Counter()
    codes: dict[CallPath, CodeType] = {}
    stack: list[CodeType] = []
    started: list[FrameType] = []  # generators: held, so that no other takes their id

    def watch(frame: FrameType, event: str, _arg: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not _is_in(folder, code):
            return
        if event == "return":
            stack.pop()
            return
        stack.append(code)
        if code.co_flags & inspect.CO_GENERATOR:
            if any(frame is other for other in started):
                return
            started.append(frame)
        path = tuple(c.co_qualname for c in stack)
        counts[path] += 1
        codes.setdefault(path, code)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        answer = run()
    finally:
        sys.setprofile(before)
    return Record(answer, dict(counts), codes)


def _is_in(folder: str, code: CodeType) -> bool:
    inside = code.co_filename.startswith(folder)
    return inside and not code.co_name.startswith("<")


@cache
def code_lines(code: CodeType) -> frozenset[tuple[str, int]]:
    """Name the lines of a function, as (file, number).

    Those that are docstring, comment or blank do not count.
    """
    lines, first = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = [
        first + number - 1
        for number, line in enumerate(lines, 1)
        if number not in prose and line.strip() and not line.strip().startswith("#")
    ]
    return frozenset((code.co_filename, number) for number in kept)


def count_lines(codes: Collection[CodeType]) -> int:
    """Count the lines of code of several functions, each line once."""
    return len(frozenset().union(*map(code_lines, codes)))


def code_of(symbol: str) -> CodeType:
    """Find the code of a function that is written `module:Class.method`.

    Raises:
        ValueError: there is no such function with Python source.
    """
    module, _, names = symbol.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
        return inspect.unwrap(found).__code__
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no function {symbol!r}: {error}") from error


class MapData(NamedTuple):
    """The lines that a road leads through: (indent, length, whether it has a twin)."""

    ours: list[tuple[int, int, bool]]
    theirs: list[tuple[int, int, bool]]


def map_data(ours: Record, theirs: Record, twins: Collection[CodeType]) -> MapData:
    """Measure every line of code of both, function by function."""
    return MapData(_measure(ours, ours.functions()), _measure(theirs, twins))


def _measure(found: Record, twins: Collection[CodeType]) -> list[tuple[int, int, bool]]:
    # A line of a function inside another belongs to the outer one.
    seen: dict[tuple[str, int], bool] = {}
    for code in found.functions():
        for place in sorted(code_lines(code)):
            seen[place] = seen.get(place, False) or code in twins
    rows = []
    for (file, number), twin in seen.items():
        line = linecache.getline(file, number).rstrip()
        rows.append((len(line) - len(line.lstrip()), len(line), twin))
    return rows


COLUMNS, TALL, GAP = 12, 100, 8  # to a band of the map, in lines of code
WIDE = 100  # of a column, in characters


def draw_map(data: MapData) -> BookFigure:
    """Draw both at one scale, as an editor draws a file from afar."""
    bands = [-(-len(rows) // (COLUMNS * TALL)) for rows in data]
    height = sum(bands) * (TALL + GAP) + 2 * 34
    figure, (ax,) = panels(height=WIDTH * height / (COLUMNS * WIDE) * 2)
    top = 0
    for rows, name, colour, band in zip(
        data, ("ours", "transformers"), (BLUE, ORANGE), bands, strict=True
    ):
        ax.text(0, top + 20, f"{name}: {len(rows):,} lines of code")
        for twin, ink, thick in ((False, "#B9BFC7", 0.7), (True, colour, 0.8)):
            bars = [
                _bar(i, row, top + 34) for i, row in enumerate(rows) if row[2] == twin
            ]
            ax.add_collection(LineCollection(bars, colors=ink, linewidths=thick))
        top += 34 + band * (TALL + GAP)
    ax.set(xlim=(-2, COLUMNS * WIDE), ylim=(top, 0))
    ax.axis("off")
    return figure


def _bar(place: int, row: tuple[int, int, bool], top: int) -> list[tuple[float, int]]:
    band, rest = divmod(place, COLUMNS * TALL)
    column, line = divmod(rest, TALL)
    y = top + band * (TALL + GAP) + line
    left, right, _ = row
    return [(column * WIDE + 0.85 * end, y) for end in (left, min(right, 108))]
