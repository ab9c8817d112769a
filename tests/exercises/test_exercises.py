"""Each exercise proves itself: right solutions pass, each mistake fails by its name."""

import functools
import importlib
import re
import time
from collections import Counter
from pathlib import Path

import kills
import pytest

from annotated_src.checks.diagnosis import check_choice, check_function, finding
from annotated_src.checks.exercise import Question, Task, size
from annotated_src.checks.running import run
from annotated_src.checks.wording import arguments
from annotated_src.exercises import CHAPTERS, chapters, find

ROOT = Path(__file__).resolve().parents[2]
each_chapter = pytest.mark.parametrize("module", CHAPTERS)
pytestmark = pytest.mark.filterwarnings("default")
# A mistake shows by its own symptom, as it does for the reader: signatures are not
# checked there. For right solutions they are.
as_the_reader_runs_it = pytest.mark.usefixtures("unchecked")


def chapter_of(module):
    return importlib.import_module(f"annotated_src.exercises.{module}").chapter


def tasks(module):
    return [e for e in chapter_of(module) if isinstance(e, Task)]


def questions(module):
    return [e for e in chapter_of(module) if isinstance(e, Question)]


def shown(task, function, seed):
    """Whether any input of a seed shows a mistake; its name is not asked for."""
    pairs = zip(task.inputs(seed), task.expected(seed), strict=True)
    return any(finding(task, case, right, run(function, case)) for case, right in pairs)


@functools.cache
def script(chapter):
    return (ROOT / "notebooks" / f"{chapter.path}.py").read_text("utf-8")


def first_that_shows(task, function):
    """The first of the inputs, which are sorted by size, that shows a mistake."""
    cases = task.inputs()
    sizes = [size(case) for case in cases]
    assert sizes == sorted(sizes)
    for case, right in zip(cases, task.expected(), strict=True):
        if finding(task, case, right, run(function, case, twice=False)):
            return case
    raise AssertionError(f"{task.name}: no input shows it")


@each_chapter
def test_a_chapter_has_four_exercises_of_three_kinds(module):
    kinds = Counter(e.kind for e in chapter_of(module))
    assert kinds.total() >= 4
    assert kinds.keys() == {"implement", "explain", "debug"}


def test_there_are_enough():
    every = [e for chapter in chapters() for e in chapter]
    assert len(every) >= 60
    assert sum(len(e.mistakes) for e in every if isinstance(e, Task)) >= 250
    assert len({e.name for e in every}) == len(every)
    assert all(find(e.name) is e for e in every)


@each_chapter
def test_right_solutions_pass_in_under_a_second(module):
    for task in tasks(module):
        assert len(task.others) >= (2 if task.kind == "implement" else 1), task.name
        for style, function in {"solution": task.solution, **task.others}.items():
            start = time.process_time()
            answer = check_function(task, function)
            assert answer, f"{task.name}, {style}:\n{answer!r}"
            assert time.process_time() - start < 1, f"{task.name}, {style}"


@each_chapter
@as_the_reader_runs_it
def test_each_mistake_fails_by_its_own_name_in_under_a_second(module):
    for task in tasks(module):
        assert len(task.mistakes) >= 5, task.name
        assert len(task.inputs()) >= 2, task.name
        for mistake in task.mistakes:
            start = time.process_time()
            answer = check_function(task, mistake.function)
            assert not answer, f"{task.name}: {mistake.name} passes"
            assert answer.mistake == mistake.name, f"{mistake.name}:\n{answer!r}"
            assert time.process_time() - start < 1, f"{task.name}, {mistake.name}"
            smallest = arguments(task, first_that_shows(task, mistake.function))
            assert smallest in {part.code for part in answer.parts}, mistake.name


@each_chapter
@as_the_reader_runs_it
def test_inputs_of_other_seeds_do_as_well(module):
    for task in tasks(module):
        for seed in (1, 2):
            assert check_function(task, task.solution, seed)
            for mistake in task.mistakes:
                assert shown(task, mistake.function, seed), mistake.name


@each_chapter
def test_every_choice_has_its_own_answer(module):
    for question in questions(module):
        assert len(question.choices) >= 3
        said = {letter: check_choice(question, letter) for letter in question.choices}
        assert [letter for letter, a in said.items() if a] == [question.right]
        assert len({choice.answer for choice in question.choices.values()}) == len(said)


@each_chapter
@as_the_reader_runs_it
def test_mutants_of_the_solutions_are_killed_or_listed(module):
    chapter = chapter_of(module)
    section = kills.section(chapter)
    assert ": ?." not in section, section
    for task in tasks(module):
        for equivalent in task.equivalents:
            assert f"- `{equivalent.line}`: " in section, f"{equivalent.line} is killed"
    if not kills.WRITE:
        assert kills.stored_section(chapter) == section.strip()


@each_chapter
def test_links_lead_to_headings_of_the_chapter(module):
    chapter = chapter_of(module)
    text = script(chapter)
    assert f"\n# # {chapter.title}\n" in text
    headings = set(re.findall(r"^# ##+ (.+)$", text, re.M))
    for exercise in chapter:
        mistakes = exercise.mistakes if isinstance(exercise, Task) else ()
        for wanted in (exercise.section, *(m.section for m in mistakes)):
            assert wanted in headings, f"{exercise.name}: no heading {wanted!r}"


@each_chapter
def test_the_chapter_shows_its_exercises_in_order(module):
    chapter = chapter_of(module)
    for face in ("show", "solution"):
        shown = re.findall(rf'^exercises\.{face}\("(\w+)"\)$', script(chapter), re.M)
        assert shown == [e.name for e in chapter], face


@each_chapter
def test_texts_are_plain_markdown(module):
    for exercise in chapter_of(module):
        texts = [exercise.text, exercise.why, exercise.title, *exercise.hints]
        if isinstance(exercise, Task):
            texts += [exercise.proves]
            texts += [x for m in exercise.mistakes for x in (m.name, m.because)]
        else:
            texts += [x for choice in exercise.choices.values() for x in choice]
            # A summary holds it, where formulas do not work.
            assert not any("$" in choice.text for choice in exercise.choices.values())
        for text in texts:
            assert not re.search(r"\{\w[\w:]*\}`", text), f"a role of MyST: {text}"
            assert "\t" not in text
            assert "\b" not in text
            assert "\f" not in text


def test_the_page_adds_up():
    text = kills.PAGE.read_text("utf-8")
    exercises, mistakes, right, killed, mutants = kills.totals(text)
    words = (
        f"{exercises} exercises, {mistakes} mistakes, {right} right solutions, "
        f"{killed} of {mutants} mutants killed"
    )
    assert words in re.sub(r"\s+", " ", text)
