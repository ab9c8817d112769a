"""The symbols of the sources, as `book/symbols/*.toml` describes them."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Symbol:
    """A name in somebody's source, and where this book has it."""

    name: str
    path: str
    does: str
    """What it does there, and what one should know; MyST. The first sentence stands
    alone in the index."""
    derived: list[str] = field(default_factory=list)
    """Labels of chapters, or `label#heading`."""
    ours: list[str] = field(default_factory=list)
    """Dotted names in the package."""
    instead: str = ""
    """Without ours: what the book uses, or why it does without."""
    differs: str = ""
    errata: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    """What the tables of equality call it, if not by its name."""
    tested: list[str] = field(default_factory=list)
    """As pytest names a function: `tests/test_x.py::test_y`."""
    exercises: list[str] = field(default_factory=list)
    see: list[str] = field(default_factory=list)
    """Other pages, as `project:symbol`."""
    version: str = ""
    """Where the symbol is only in some versions of the source: which."""
    gone: bool = False
    """Whether the version that is installed for the tests does not have it."""


@dataclass(frozen=True)
class Project:
    """One source: its symbols in the order of its files."""

    slug: str
    title: str
    about: str
    installed: bool
    """Whether the tests have it; paths then begin with the package."""
    symbols: list[Symbol]


def read_projects(folder: Path) -> list[Project]:
    """Read all projects, in the order that their files ask for."""
    contents = [
        (path.stem, tomllib.loads(path.read_text("utf-8")))
        for path in folder.glob("*.toml")
    ]
    contents.sort(key=lambda item: item[1]["order"])
    return [read_project(slug, content) for slug, content in contents]


def read_project(slug: str, content: dict) -> Project:
    """Make a project of what its file holds; a key that is none is a TypeError."""
    symbols = [
        Symbol(**{"path": file["path"], **entry})
        for file in content["file"]
        for entry in file["symbol"]
    ]
    return Project(
        slug, content["title"], content["about"], content["installed"], symbols
    )


def page_name(*parts: str) -> str:
    """Name the page of `project`, `symbol`, or of `project:symbol`."""
    return re.sub(r"[^a-z0-9_]+", "-", "-".join(parts).lower()).strip("-")
