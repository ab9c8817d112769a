"""What holds for every chapter. Its outputs are compared by nbval, in `make test`."""

import ast
import importlib.util
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupytext.compare import compare_notebooks

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("*/*.py"))
MODULES = sorted((ROOT / "annotated_src").rglob("*.py"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.])(/(root|home|tmp|usr|Users|work|var)/|[A-Z]:\\)")
DISPLAYED = re.compile(
    r"^\$\$\s*$(.*?)^\$\$[ \t]*(\((?P<label>[\w-]+)\))?", re.M | re.S
)

chapter = pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.stem}"
)


def notebook(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def code_cells(script):
    return [cell for cell in notebook(script).cells if cell.cell_type == "code"]


def prose(script):
    cells = notebook(script).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def output_text(script):
    """All text that the saved outputs show."""
    for cell in code_cells(script):
        for output in cell.outputs:
            if "text" in output:
                yield output.text
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/png"):
                    yield data


def test_there_is_a_chapter():
    assert SCRIPTS


@chapter
def test_script_and_notebook_are_a_pair(script):
    stored = jupytext.read(script.with_suffix(".ipynb"))
    compare_notebooks(stored, jupytext.read(script), fmt="py:percent")


@chapter
def test_every_cell_ran_once_and_in_order(script):
    counts = [c.execution_count for c in code_cells(script) if c.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


@chapter
def test_outputs_hold_no_error_warning_or_path(script):
    for cell in code_cells(script):
        for output in cell.outputs:
            assert output.output_type != "error", output.get("evalue")
            assert output.get("name") != "stderr", output.text
    for text in output_text(script):
        assert "Warning" not in text
        assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)
        assert "0x" not in text or not re.search(r"0x[0-9a-f]{6,}", text)


@chapter
def test_every_displayed_equation_has_a_label_and_a_check(script):
    checks = "\n".join(
        line
        for cell in code_cells(script)
        for line in cell.source.splitlines()
        if line.startswith("# Check") and "confirm(" in cell.source
    )
    labels = []
    for match in DISPLAYED.finditer(prose(script)):
        assert match["label"], f"no label: {match[1].strip()[:60]}"
        labels.append(match["label"])
        assert match["label"] in checks, f"no cell checks {match['label']}"
    assert len(labels) == len(set(labels))
    assert set(re.findall(r"eq-[\w-]*\w", checks)) <= set(labels)


@chapter
def test_every_image_has_alt_text_and_a_caption(script):
    for cell in code_cells(script):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                shown = cell.metadata["mystnb"]
                assert len(shown["image"]["alt"]) > 40
                assert shown["figure"]["caption"]


@chapter
def test_the_template_is_there(script):
    text = prose(script)
    for part in (
        "In this chapter",
        "Predict before you run",
        "Break it",
        "Exercises",
        "What to remember",
        "Where to read on",
    ):
        assert part in text, part
    solutions = text.count('<details class="solution">') + sum(
        "solution" in cell.metadata.get("tags", []) for cell in code_cells(script)
    )
    assert solutions >= 3


@chapter
def test_solutions_are_closed_in_the_book_and_in_jupyterlab(script):
    for cell in code_cells(script):
        if "solution" in cell.metadata.get("tags", []):
            assert "hide-cell" in cell.metadata.tags
            assert cell.metadata.jupyter.source_hidden
            label = "Solution" if "answer" in cell.metadata.tags else "More on it"
            assert cell.metadata.mystnb.code_prompt_show == label


class Shape(ast.NodeTransformer):
    """Forget docstrings, annotations and the names of variables."""

    def __init__(self):
        self.names = {}

    def visit_Name(self, node):
        number = self.names.setdefault(node.id, len(self.names))
        return ast.Name(f"v{number}", ast.Load())

    def visit_arg(self, node):
        number = self.names.setdefault(node.arg, len(self.names))
        return ast.arg(f"v{number}")

    def visit_FunctionDef(self, node):
        arguments = self.visit(node.args)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return ast.FunctionDef("f", arguments, [self.visit(s) for s in body], [], None)


def functions(source):
    """Map the shape of each function in a source to its name, the smallest left out."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(list(ast.walk(node))) > 25:
            name = node.name
            found[ast.dump(Shape().visit(node))] = name
    return found


PACKAGE_FUNCTIONS = {}
for module in MODULES:
    if module.parent.name == "exercises":  # mistakes may look like anything
        continue
    PACKAGE_FUNCTIONS |= functions(module.read_text("utf-8"))


def test_a_retyped_function_is_noticed():
    retyped = '''
def mine(scores, times):
    """Other words."""
    joint = scores[:, :, None].expand(-1, -1, times, -1, -1)
    return joint.flatten(1, 2)
'''
    (shape,) = functions(retyped)
    assert PACKAGE_FUNCTIONS[shape] == "repeat_kv"


@chapter
def test_no_function_of_the_package_is_typed_again(script):
    for shape, name in functions(script.read_text("utf-8")).items():
        assert shape not in PACKAGE_FUNCTIONS, (
            f"{name} is {PACKAGE_FUNCTIONS[shape]} again"
        )


def load_executor():
    spec = importlib.util.spec_from_file_location(
        "execute", ROOT / "notebooks/execute.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_chapter_is_stale_when_code_that_it_reaches_changes(tmp_path, monkeypatch):
    execute = load_executor()
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    package = tmp_path / "annotated_src"
    package.mkdir()
    (package / "leaf.py").write_text("x = 1\n")
    (package / "far.py").write_text("y = 1\n")
    (package / "trunk.py").write_text("from annotated_src.leaf import x\n")
    script = tmp_path / "chapter.py"
    script.write_text("from annotated_src import trunk\n")
    before = execute.fingerprint(script)
    (package / "far.py").write_text("y = 2\n")
    assert execute.fingerprint(script) == before
    (package / "leaf.py").write_text("x = 2\n")
    assert execute.fingerprint(script) != before


def test_running_a_chapter_twice_gives_the_same_bytes(tmp_path):
    execute = load_executor()
    script = tmp_path / "chapter.py"
    script.write_text("# %%\nimport torch\n\nprint(torch.arange(3))\n")
    first = execute.execute(script).read_bytes()
    assert b"tensor([0, 1, 2])" in first
    assert execute.execute(script).read_bytes() == first
