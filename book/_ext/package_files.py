"""Where the files of the package stand in the book, and the names that they define."""

import ast
import re
from functools import cache
from pathlib import Path

from segments import definitions

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "annotated_src"


def modules() -> list[Path]:
    """List every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """Name a module as Python imports it: annotated_src.models.llama."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def page(path: Path) -> str:
    """Name the page that shows a module: source/models/llama."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(("source", *("index" if p == "__init__" else p for p in parts)))


def map_of_package() -> list[tuple[str, str, list[Path]]]:
    """Read the package's map: what stands there, in words, and its files.

    A folder's files are its `__init__.py`, then the others.
    """
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")))
    found = []
    for name, words in re.findall(r"^    ([\w.]+)  +(\S.*)$", text or "", re.M):
        place = PACKAGE.joinpath(*name.split("."))
        if place.is_dir():
            init = place / "__init__.py"
            found.append(
                (name, words, [init, *sorted({*place.rglob("*.py")} - {init})])
            )
        elif (file := place.with_suffix(".py")).exists():
            found.append((name, words, [file]))
    return found


@cache
def names() -> dict[str, tuple[Path, int, int]]:
    """Map each dotted name of a module, function, class, method or constant.

    To its file, its first line and its last.
    """
    found: dict[str, tuple[Path, int, int]] = {}
    for path in modules():
        tree, module = ast.parse(path.read_text("utf-8")), dotted(path)
        found[module] = (path, 1, 1)
        for name, node in definitions(tree):
            lines = [node.lineno, *(item.lineno for item in node.decorator_list)]
            found[f"{module}.{name}"] = (path, min(lines), node.end_lineno or 1)
        for node in tree.body:
            for name in _assigned(node):
                end = node.end_lineno or node.lineno
                found.setdefault(f"{module}.{name}", (path, node.lineno, end))
    return found


def _assigned(node: ast.stmt) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def resolve(name: str) -> str | None:
    """Follow a dotted name to where it is defined, if a module only imports it."""
    module, _, last = name.rpartition(".")
    if name in names() or module not in names():
        return name if name in names() else None
    tree = ast.parse(names()[module][0].read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if last == (alias.asname or alias.name):
                    return resolve(f"{node.module}.{alias.name}")
    return None
