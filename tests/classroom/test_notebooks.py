"""Notebooks for a class: deterministic, solvable, and without the solutions."""

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from annotated_src.checks.comparing import difference
from annotated_src.checks.diagnosis import check_choice, check_function, finding
from annotated_src.checks.exercise import Question, Task
from annotated_src.checks.running import Outcome
from annotated_src.classroom.course import build, chapter_named, prove
from annotated_src.classroom.inside import wire
from annotated_src.classroom.marking import POINTS, points_of
from annotated_src.classroom.notebooks import notebook_of, starter, written
from annotated_src.classroom.plan import END, START, updated
from annotated_src.classroom.settings import NAMED
from annotated_src.exercises import CHAPTERS, check

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "book" / "teaching.md"
each_chapter = pytest.mark.parametrize("module", CHAPTERS)
pytestmark = pytest.mark.filterwarnings("default")


def code_of(notebook):
    """The code cells of a notebook, by the names that nbgrader has for them."""
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    return {c.metadata.nbgrader["grade_id"]: c for c in cells}


def lines_of(text):
    """The lines of a text that say something of their own."""
    plain = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return {line for line in plain if len(line) > 15}


@each_chapter
def test_a_student_gets_no_solution(module):
    chapter = chapter_named(module)
    notebook = notebook_of(chapter, 1, "student")
    text = written(notebook).decode("utf-8")
    sources = [c.source for c in notebook.cells]
    given = set().union(*map(lines_of, sources))
    solved = code_of(notebook_of(chapter, 1, "solution"))
    # a line may stand in the broken function of another exercise
    start = set().union(*(lines_of(starter(e)) for e in chapter))
    for exercise in chapter:
        if isinstance(exercise, Question):
            for choice in exercise.choices.values():
                assert choice.answer not in "\n".join(sources), exercise.name
            assert f'{exercise.name} = "?"' in "\n".join(sources)
            continue
        own = lines_of(solved[exercise.name].source)
        assert own - start, f"{exercise.name}: nothing is left to do"
        assert not (own - start) & given, exercise.name
    for word in ("HIDDEN", "SOLUTION", "seed=", "RuntimeError", "nbgrader_config"):
        assert word not in text, word


@each_chapter
def test_a_solved_notebook_passes_its_checks(module):
    chapter = chapter_named(module)
    cells = code_of(notebook_of(chapter, 1, "solution"))
    names = {"__name__": "solved"}
    exec(cells["imports"].source, names)
    for exercise in chapter:
        exec(compile(cells[exercise.name].source, exercise.name, "exec"), names)
        made = names[exercise.name]
        checked = check_function if isinstance(exercise, Task) else check_choice
        assert checked(exercise, made), exercise.name


@each_chapter
def test_inputs_and_results_travel_between_processes(module):
    """Inputs name nothing of the exercises, which are not there; results are plain."""
    for task in chapter_named(module):
        if not isinstance(task, Task):
            continue
        for case, outcome in zip(task.inputs(1), task.expected(1), strict=True):
            assert b"annotated_src.exercises" not in pickle.dumps(case), task.name
            told = json.loads(json.dumps(wire.plain(outcome.value)))
            back = Outcome(outcome.kind, wire.value_of(told), outcome.error)
            assert difference(outcome.value, back.value) is None, task.name
            if outcome.kind == "returned":
                assert finding(task, case, outcome, back) is None, task.name
            assert outcome.kind in ("returned", "raised"), task.name


def test_debug_begins_with_the_broken_function_and_implement_with_none():
    chapter = chapter_named("heads")
    for name in ("attend_rows", "repeat_kv"):
        names = {}
        cells = code_of(notebook_of(chapter, 1, "student"))
        exec(cells["imports"].source, names)
        exec(cells[name].source, names)
        found = check(names[name])
        broken = "0 0 1 1 where 0 1 0 1 is due" if name == "attend_rows" else ""
        assert found.mistake == broken
        assert found.kind == ("values" if broken else "unfinished")
        assert names[name].__doc__ == chapter[name].solution.__doc__


@pytest.mark.parametrize("kind", ["student", "solution"])
def test_check_cells_answer_and_end_in_points(kind):
    chapter = chapter_named("heads")
    cells = code_of(notebook_of(chapter, 1, kind))
    shown = []
    names = {"display": shown.append}
    exec(cells["imports"].source, names)
    for exercise in chapter:
        exec(cells[exercise.name].source, names)
        tree = ast.parse(cells[f"check_{exercise.name}"].source)
        last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, "check", "exec"), names)
        points = eval(compile(last, "points", "eval"), names)
        assert points == (points_of(exercise) if kind == "solution" else 0)
        assert bool(shown.pop()) == (kind == "solution")
    assert check("what_gqa_speeds_up", "?").kind == "unfinished"


def test_points_follow_difficulty():
    chapter = chapter_named("heads")
    assert POINTS == {"easy": 1, "moderate": 2, "hard": 3}
    assert [points_of(e) for e in chapter] == [1, 1, 2, 2]
    first = notebook_of(chapter, 6, "student", "https://example.org/book/").cells[0]
    assert "About 25\nminutes, 6 points" in first.source
    page = "[Sharing heads](https://example.org/book/notebooks/llama/06_heads.html)"
    assert f"chapter 6 of *Decoders, Taken Apart*: {page}." in first.source
    plain = notebook_of(chapter, 6, "student").cells[0].source
    assert "`notebooks/llama/06_heads.ipynb`" in plain


def test_building_twice_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("one", "two"):
        files.append(build(tmp_path / name, ["heads", "cache"], seed=5))
    assert len(files[0]) == 7
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    (tmp_path / "one/course/submitted").mkdir()
    (tmp_path / "one/course/gradebook.db").touch()
    build(tmp_path / "one", ["heads"], seed=6)
    assert (tmp_path / "one/student/cache.ipynb").exists()
    assert (tmp_path / "one/course/gradebook.db").exists()
    assert (tmp_path / "one/course/submitted").exists()
    assert "seed=6" in (tmp_path / "one/course/nbgrader_config.py").read_text("utf-8")


@each_chapter
def test_a_hand_in_is_known_by_its_file_name(module):
    for student in ("ada", "van_der_berg", "Tim Müller_12_file"):
        found = re.match(NAMED, f"/extracted/some_heads/{student}_{module}.ipynb")
        assert found.groupdict() == {"student_id": student, "file_id": module}
    for name in (f"{module}.ipynb", f"ada_{module} (1).ipynb", "ada_ropes.ipynb"):
        assert not re.match(NAMED, f"/extracted/{name}")


def test_what_cannot_be_built_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no chapter 'ropes'"):
        build(tmp_path, ["ropes"])
    with pytest.raises(ValueError, match="seed 0"):
        build(tmp_path, ["heads"], seed=0)
    with pytest.raises(ValueError, match="got 'teacher'"):
        notebook_of(chapter_named("heads"), 6, "teacher")
    assert not list(tmp_path.iterdir())


def test_a_seed_is_tried_before_it_is_used(monkeypatch):
    task = chapter_named("heads")["repeat_kv"]
    tasks = [e for e in chapter_named("heads") if isinstance(e, Task)]
    count = sum(1 + len(e.others) + len(e.mistakes) for e in tasks)
    assert prove(["heads"], 5) == count > 20
    monkeypatch.setitem(task.others, "a mistake", lambda x, times: x)
    with pytest.raises(ValueError, match="seed 5: repeat_kv, 'a mistake', fails"):
        prove(["heads"], 5)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "annotated_src.classroom", "--chapters", "ropes"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "there is no chapter 'ropes'" in ended.stderr
    assert not ended.stdout
    assert not list(tmp_path.iterdir())


def test_the_guide_has_the_minutes_of_every_exercise():
    # brought up to date by `python -m annotated_src.classroom --minutes` and the page
    every = [chapter_named(name) for name in CHAPTERS]
    text = GUIDE.read_text("utf-8")
    assert updated(text, every) == text
    assert "| 6 | {ref}`ch-heads` | `heads` | 40 | `repeat_kv` 5," in text
    assert updated(text.replace("40 |", "41 |"), every) == text
    for mark in (START, END):
        with pytest.raises(ValueError, match="lacks"):
            updated(text.replace(mark, ""), every)


def test_the_plans_of_the_guide_fit_into_their_time():
    rows = re.findall(r"^\| (\d+) \|.* (\d+)–(\d+) \|$", GUIDE.read_text("utf-8"), re.M)
    least, most = ([int(row[i]) for row in rows] for i in (1, 2))
    weeks, days = slice(0, 12), slice(12, 15)
    assert len(rows) == 15
    assert max(least[weeks]) <= 300
    assert [n for n, m in enumerate(most[weeks], 1) if m > 300] == [3, 9, 10]
    assert max(least[days]) <= 360
    assert [n for n, m in enumerate(most[days], 1) if m > 360] == [1, 2]


def test_every_mistake_that_the_guide_names_exists():
    rows = re.findall(
        r"^\| .* \| \*(.+?)\* \| `(\w+)` \|", GUIDE.read_text("utf-8"), re.M
    )
    assert len(rows) >= 12
    every = [e for name in CHAPTERS for e in chapter_named(name)]
    known = {(m.name, e.name) for e in every if isinstance(e, Task) for m in e.mistakes}
    assert not set(rows) - known


def test_both_plans_of_the_guide_visit_every_chapter_that_they_say():
    text = GUIDE.read_text("utf-8")
    weeks, _, days = text.partition("## Three days")
    weeks = weeks.partition("## Twelve weeks")[2]
    labels = re.findall(r"\{ref\}`(ch-[a-z0-9-]+)`", weeks)
    in_book = [
        re.search(r"^# \((ch-.*?)\)=$", p.read_text("utf-8"), re.M)[1]
        for p in sorted((ROOT / "notebooks").glob("*/[0-9]*.py"))
    ]
    assert sorted(labels) == sorted(in_book)
    in_days = re.findall(r"\{ref\}`(ch-[a-z0-9-]+)`", days.partition("\n## ")[0])
    assert set(in_days) <= set(in_book)
    assert len(in_days) >= 9
