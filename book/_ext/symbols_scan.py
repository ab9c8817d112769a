"""What the chapters and the tables of equality hold, read off their files."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from myst_parser.slugs import github_slugify, unique_slug

HEADING = re.compile(r"# #{2,3} (.+)")
ERRATUM = re.compile(r"# \| ([BCL]\d+) \| .*? \| (.*) \| (.*) \|")


@dataclass(frozen=True)
class Chapter:
    """A notebook: its label, its page, and its headings with their anchors."""

    label: str
    page: str
    slugs: dict[str, str]
    lines: list[tuple[int, str]]
    """Where each heading stands in the script."""

    def heading_at(self, line: int) -> str:
        """Return the last heading above a line, of a cell."""
        return next((text for at, text in reversed(self.lines) if at < line), "")


class Equality(NamedTuple):
    """A row of a table of equality: what the original calls it, and how much."""

    page: str
    section: str
    originals: set[str]
    count: int
    """Tensors, or cases of a tokenizer."""


@dataclass(frozen=True)
class Book:
    """All that pages of symbols link to."""

    chapters: dict[str, Chapter]
    shown: list[tuple[str, Chapter, str]]
    """Dotted name, chapter and heading of everything that a cell shows."""
    exercises: dict[str, Chapter]
    errata: dict[str, tuple[str, str]]
    """By number: what is said, and what is."""
    equality: list[Equality]


def scan_book(root: Path) -> Book:
    """Read all chapters, and the pages that compare with the originals."""
    book = Book({}, [], {}, {}, [])
    for path in sorted((root / "notebooks").glob("*/*.py")):
        source = path.read_text("utf-8")
        page = path.relative_to(root).with_suffix("").as_posix()
        chapter = scan_headings(page, source)
        book.chapters[chapter.label] = chapter
        for line, name in find_shown(ast.parse(source)):
            if name.startswith("exercises.show("):
                book.exercises[name.removeprefix("exercises.show(")] = chapter
            elif name.count(".") > 1:  # code, and not the map of the package
                book.shown.append((name, chapter, chapter.heading_at(line)))
        for number, says, does in ERRATUM.findall(source):
            book.errata[number] = says, does
    for name in ("equality", "equality_llama"):
        book.equality.extend(read_equality(name, root / "book" / f"{name}.md"))
    return book


def scan_headings(page: str, source: str) -> Chapter:
    """Find label and headings in the markdown cells of a script."""
    label, lines, slugs, taken = "", [], {}, set()
    in_markdown = False
    for number, line in enumerate(source.splitlines(), start=1):
        if line.startswith("# %%"):
            in_markdown = "[markdown]" in line
        elif in_markdown and (found := re.fullmatch(r"# \((ch-[\w-]+)\)=", line)):
            label = found[1]
        elif in_markdown and (found := re.fullmatch(r"# #{1,3} (.+)", line)):
            slug = unique_slug(github_slugify(found[1]), taken)
            taken.add(slug)
            slugs[found[1]] = slug
            lines.append((number, found[1] if HEADING.fullmatch(line) else ""))
    return Chapter(label, page, slugs, lines)


def find_shown(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find each `show(x)`, x as a dotted name, and each `exercises.show("name")`."""
    names = dict(imported(tree))
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        function = ast.unparse(call.func)
        for item in call.args:
            if function == "exercises.show" and isinstance(item, ast.Constant):
                yield call.lineno, f"exercises.show({item.value}"
            elif function == "show":
                first, _, rest = ast.unparse(item).partition(".")
                yield call.lineno, names.get(first, first) + "." * bool(rest) + rest


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Map each imported name of a notebook to the dotted name that it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield item.asname or item.name, item.name
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                yield item.asname or item.name, f"{node.module}.{item.name}"


def read_equality(page: str, path: Path) -> Iterator[Equality]:
    """Read the rows whose first cell names the original in code."""
    section = ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        quoted = " ".join(re.findall(r"`(.*?)`", cells[0]))
        originals = set(re.findall(r"[\w.]+", quoted))
        if line.startswith("| `") and len(cells) >= 3:
            yield Equality(page, section, originals, count(cells[4:]))


def count(cells: list[str]) -> int:
    """Count the tensors, or cases, that the last cell of a row speaks of."""
    if not cells or cells[0].isdigit():
        return int("".join(cells) or 0)
    found = re.findall(r"`[^`]+`(?: \((\d+)\))?", cells[0])
    return sum(int(number or 1) for number in found)
