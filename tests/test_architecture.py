"""The package keeps its own rules: order of imports, sizes, docstrings."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "annotated_src"
MAP = (PACKAGE / "__init__.py").read_text("utf-8")
# A line of the map: four blanks, a module, at least two blanks, what it is.
ORDER = re.findall(r"^    ([a-z_.0-9]+)  +\S", MAP, re.M)
FOLDERS = ("checks", "exercises", "classroom", "figures")
AS_COMMAND = "if __name__ == '__main__':"
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def package_of(name):
    """The folder that a module shares its line in the map with, or nothing."""
    first = name.split(".")[0]
    return first if first in FOLDERS else ""


def place(name):
    """Its line in the map; the modules of some folders share one."""
    return ORDER.index(package_of(name) or name)


each = pytest.mark.parametrize("path", FILES, ids=name_of)
each_but_figures = pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "figures"], ids=name_of
)
# The exercises of a chapter are a list: each thing in it is short, the list is not.
each_text = pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent.name not in ("figures", "exercises")],
    ids=name_of,
)


def is_source(place):
    """Whether a module is there, or a folder with code of its own, as exercises has."""
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imports_of(path):
    """Yield the modules of the package that a file imports, even inside functions.

    What it does when run as a command is left out: that may call anything.
    """
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [n for n in tree.body if not ast.unparse(n).startswith(AS_COMMAND)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for dotted in found:
            parts = dotted.split(".")
            if parts[0] != PACKAGE.name:
                continue
            while not is_source(PACKAGE.joinpath(*parts[1:])):
                parts.pop()  # a name inside the module, or a folder
            yield ".".join(parts[1:])


def test_the_map_lists_every_module_once_and_figures_last():
    names = {name_of(path) for path in FILES}
    listed = {package_of(name) or name for name in names}
    assert set(ORDER) == listed
    assert len(ORDER) == len(listed)
    assert ORDER[-1] == "figures"


@each
def test_imports_come_from_above(path):
    name = name_of(path)
    for imported in imports_of(path):
        together = package_of(name) and package_of(name) == package_of(imported)
        assert place(imported) < place(name) or together, imported
        assert not (name.startswith("models.") and imported.startswith("models."))


def test_the_import_finder_finds():
    found = set(imports_of(PACKAGE / "models" / "llama.py"))
    assert {"attention", "rotary", "placement"} <= found
    assert "models.llama" in set(imports_of(PACKAGE / "architectures.py"))


@each
def test_no_assert_and_no_print_but_of_confirm(path):
    tree = ast.parse(path.read_text("utf-8"))
    confirm = [n for n in tree.body if getattr(n, "name", "") == "confirm"]
    allowed = {node for function in confirm for node in ast.walk(function)}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert node in allowed, f"print in line {node.lineno}"


@each_text
def test_a_module_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 200


@each
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]
    for node in (tree, *public):
        assert ast.get_docstring(node), getattr(node, "name", "the module")


@each_but_figures
def test_a_function_fits_on_a_page(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 40, f"{node.name}: {lines} lines"
