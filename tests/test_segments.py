"""The annotated source of the book: no line of the package is lost or altered."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))

from package_files import dotted, map_of_package, modules, names, page  # noqa: E402
from segments import segments  # noqa: E402
from shown import places  # noqa: E402

MODULES = modules()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_code_and_notes_make_up_the_module(path):
    lines = path.read_text("utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    found = segments("\n".join(lines))
    code = [pair for segment in found for pair in segment.code]
    assert code == sorted(code)
    assert all(lines[number - 1] == line for number, line in code)
    missing = set(range(1, len(lines) + 1)) - {number for number, _ in code}
    notes = "\n".join(
        "\n".join([*segment.comment, segment.docstring]) for segment in found
    )
    for number in sorted(missing):
        words = lines[number - 1].strip().strip('"').removeprefix("#").strip()
        assert words in notes, f"line {number} is on neither side: {words}"
    docstrings = sum(len(segment.docstring) > 0 for segment in found)
    assert docstrings >= (ast.get_docstring(tree) is not None)


def test_a_note_stands_beside_what_it_is_about():
    found = segments(
        '"""What it is for."""\n\nimport math\n\n# Two pi.\nTAU = 2 * math.pi\n\n\n'
        'def turn(x):\n    """Turn once."""\n    # Radians.\n    return x + TAU\n\n\n'
        'class Wheel:\n    """It turns."""\n\n    def roll(self):\n'
        '        """Roll on."""\n        return turn(0)\n'
    )
    rows = [(s.name, s.docstring, s.comment, [n for n, _ in s.code]) for s in found]
    assert rows == [
        ("", "What it is for.", [], [3]),
        ("", "", ["Two pi."], [6]),
        ("turn", "Turn once.", [], [9]),
        ("", "", ["Radians."], [12]),
        ("Wheel", "It turns.", [], [15]),
        ("Wheel.roll", "Roll on.", [], [18, 20]),
    ]


def test_text_in_a_string_is_no_comment():
    (only,) = segments('TEXT = """\n# a heading\n"""\n')
    assert [n for n, _ in only.code] == [1, 2, 3]


def test_every_module_has_a_page_and_every_name_a_line():
    listed = [file for _, _, files in map_of_package() for file in files]
    assert len(listed) == len(set(listed))
    left = {path.relative_to(ROOT).as_posix() for path in set(MODULES) - set(listed)}
    assert left == {"annotated_src/__init__.py", "annotated_src/models/__init__.py"}
    assert len({page(path) for path in listed}) == len(listed)
    for name, (path, first, _) in names().items():
        if name != dotted(path):
            line = path.read_text("utf-8").splitlines()[first - 1]
            assert name.rpartition(".")[2] in line or line.lstrip().startswith("@")


def test_what_chapters_show_is_found():
    found = places()
    assert set(found) <= set(names())
    assert {place.page for place in found["annotated_src.attention.attend"]} >= {
        "notebooks/llama/05_attention"
    }
    shown = sum(
        "show(" in path.read_text("utf-8")
        for path in (ROOT / "notebooks").glob("*/*.py")
    )
    pages = {place.page for where in found.values() for place in where}
    assert len(pages) == shown
