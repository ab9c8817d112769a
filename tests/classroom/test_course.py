"""A class of six, through nbgrader, by the commands of the teacher's guide."""

import contextlib
import csv
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

GUIDE = Path(__file__).resolve().parents[2] / "book" / "teaching.md"
# The guide's commands, one block after the other: build, give out, mark.
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)
QUICK = (
    "\nc = get_config()\nc.MarkApart.cell_seconds = c.MarkApart.call_seconds = 1.5\n"
)
WRONG = {
    "repeat_kv": "def repeat_kv(x, times):\n    return x.repeat(1, times, 1, 1)",
    "tokens_that_fit": "def tokens_that_fit(num_bytes, num_layers):\n    return 1",
    "what_gqa_speeds_up": 'what_gqa_speeds_up = "a"',
}
POINTS = {
    "check_repeat_kv": 1,
    "check_tokens_that_fit": 1,
    "check_what_gqa_speeds_up": 2,
    "check_attend_rows": 2,
}
MARKS = {"right": 6, "half_right": 3, "wrong": 0, "crash": 3, "deleter": 5, "forger": 0}


def shell(commands, folder):
    """Run commands of the guide, from a folder, with this Python's programs."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def named(notebook):
    """The cells that nbgrader knows, by name."""
    pairs = (
        (c.metadata.get("nbgrader", {}).get("grade_id"), c) for c in notebook.cells
    )
    return {name: cell for name, cell in pairs if name}


def handed_in(student, release, solved):
    """What a student makes of the notebook that was given out."""
    notebook = nbformat.read(release, 4)
    solutions = {n: c.source for n, c in solved.items() if c.metadata.nbgrader.solution}
    cells = named(notebook)
    answers = {"right": solutions, "wrong": WRONG, "forger": {}}.get(student, solutions)
    if student == "half_right":
        answers = {n: solutions[n] for n in ("repeat_kv", "what_gqa_speeds_up")}
    for name, source in answers.items():
        cells[name].source = source
    if student == "wrong":
        notebook.cells.append(new_markdown_cell("<script>alert(1)</script>"))
    if student == "crash":
        cells["repeat_kv"].source += "\nraise ValueError('after all')"
        loop = solutions["tokens_that_fit"].partition("\n")[0]
        cells["tokens_that_fit"].source = f"{loop}\n    while True: pass"
        cells["attend_rows"].source = "import os; os._exit(0)"
        notebook.cells.insert(2, new_code_cell("while True: pass"))
    if student == "deleter":
        gone = ("imports", "repeat_kv", "check_repeat_kv", "check_tokens_that_fit")
        notebook.cells = [c for c in notebook.cells if c not in map(cells.get, gone)]
    if student == "forger":
        for name in POINTS:
            cells[name].source = "6"
            cells[name].metadata.nbgrader["points"] = 600
            output = nbformat.v4.new_output("execute_result", {"text/plain": "6"})
            cells[name].outputs = [output]
        more = {"grade": True, "solution": False, "locked": False, "points": 99}
        more |= {"grade_id": "extra", "schema_version": 3, "task": False}
        notebook.cells.append(new_code_cell("99", metadata={"nbgrader": more}))
        twice = nbformat.from_dict(cells["check_repeat_kv"])
        notebook.cells.append(new_code_cell("1", metadata=twice.metadata))
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course whose six students have been marked."""
    folder = tmp_path_factory.mktemp("class")
    os.environ.pop("JUPYTER_CONFIG_DIR", None)
    build, give_out, mark = BLOCKS[:3]
    shell(build, folder)
    made = folder / ".build" / "exercises"
    course = made / "course"
    with (course / "nbgrader_config.py").open("a", encoding="utf-8") as file:
        file.write(QUICK)
    shell(give_out, folder)
    solved = named(nbformat.read(made / "solutions" / "heads.ipynb", 4))
    release = course / "release" / "heads" / "heads.ipynb"
    place = course / "downloaded" / "heads" / "archive"
    place.mkdir(parents=True)
    for student in MARKS:
        notebook = handed_in(student, release, solved)
        nbformat.write(notebook, place / f"{student}_heads.ipynb")
    (folder / "said.txt").write_text(shell(mark, course), "utf-8")
    return folder


@pytest.fixture
def autograded(course):
    """Read the marked notebook of a student: its cells by name."""

    def read(student):
        place = course / ".build/exercises/course/autograded" / student
        return named(nbformat.read(place / "heads" / "heads.ipynb", 4))

    return read


def test_marks_are_exact(course):
    place = course / ".build/exercises/course/grades.csv"
    with place.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["student_id"]: float(row["score"]) for row in rows}
    assert found == MARKS
    assert {float(row["max_score"]) for row in rows} == {6.0}
    assert {row["assignment"] for row in rows} == {"heads"}


def test_a_due_date_is_kept(course):
    place = course / ".build/exercises/course"
    shell(BLOCKS[3], place)
    with contextlib.closing(sqlite3.connect(place / "gradebook.db")) as book:
        ((due,),) = book.execute("select duedate from assignment where name = 'heads'")
    assert due.startswith("2030-03-01 12:00:00")


def test_what_is_given_out_is_the_student_notebook(course):
    made = course / ".build" / "exercises"
    release = nbformat.read(made / "course/release/heads/heads.ipynb", 4)
    for cell in release.cells:
        about = cell.metadata.get("nbgrader", {})
        for key in ("checksum", "cell_type"):
            about.pop(key, None)
    assert release.cells == nbformat.read(made / "student/heads.ipynb", 4).cells


def test_feedback_names_the_mistake_and_asks_no_network(course):
    place = course / ".build/exercises/course/feedback"
    for student, points in MARKS.items():
        page = (place / student / "heads" / "heads.html").read_text("utf-8")
        assert f"heads (Score: {points:.1f} / 6.0)" in page
        assert "<script" not in page
        assert page.index("default-src 'none'") < page.index("<body")
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
        assert "HIDDEN" not in page
    page = (place / "wrong/heads/heads.html").read_text("utf-8")
    assert "Looks like: repeat for repeat_interleave." in page
    assert "“0 0 1 1, and what it costs” in notebooks/llama/06_heads.ipynb" in page
    assert "but its 2,000 queries share one reading" in page
    assert (
        "It is called as <code>tokens_that_fit(num_bytes, num_layers, num_heads" in page
    )
    assert "Looks like: 0 0 1 1 where 0 1 0 1 is due." in page


def test_a_notebook_that_crashes_is_marked_exercise_by_exercise(autograded):
    cells = autograded("crash")
    points = {n: cells[n].outputs[-1].data["text/plain"] for n in POINTS}
    assert list(points.values()) == ["1", "0", "2", "0"]
    said = {n: cells[n].outputs[0].data["text/plain"] for n in POINTS}
    assert "did not come to an end" in said["check_tokens_that_fit"]
    assert "There is no function attend_rows" in said["check_attend_rows"]
    assert "It ended the whole process" in said["check_attend_rows"]
    assert cells["repeat_kv"].outputs[0].ename == "ValueError"


def test_deleted_cells_come_back_and_cost_only_what_was_in_them(autograded, course):
    cells = autograded("deleter")
    assert set(POINTS) < set(cells)
    assert "repeat_kv" not in cells
    order = list(cells)
    assert order[0] == "imports"
    assert order.index("check_tokens_that_fit") == 1 + order.index("tokens_that_fit")
    missing = cells["check_repeat_kv"].outputs[0].data["text/plain"]
    assert "There is no function repeat_kv" in missing
    said = (course / "said.txt").read_text("utf-8")
    assert "Cell 'check_repeat_kv' was missing and is put back" in said
    assert "has changed!" not in said  # nbgrader would say so of honest work


def test_a_forged_notebook_wins_nothing(autograded):
    cells = autograded("forger")
    for name, points in POINTS.items():
        assert cells[name].metadata.nbgrader["points"] == points
        assert cells[name].outputs[-1].data["text/plain"] == "0"
        assert cells[name].source.startswith("answer = check(")
    assert "extra" not in cells
