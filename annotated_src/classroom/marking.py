"""Mark a notebook: run its cells elsewhere, and judge here what its functions did."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_src.checks.answers import Answer, Part
from annotated_src.checks.diagnosis import check_choice, judge
from annotated_src.checks.exercise import Question, Task
from annotated_src.checks.running import Outcome
from annotated_src.classroom.child import Limits, Stopped
from annotated_src.classroom.inside import wire
from annotated_src.classroom.session import Note, Session

POINTS = {"easy": 1, "moderate": 2, "hard": 3}


def points_of(exercise: Task | Question) -> int:
    """Give what an exercise is worth, all or nothing: 1, 2 or 3 by its difficulty."""
    return POINTS[exercise.difficulty]


@dataclass(frozen=True)
class Cell:
    """A cell of the student's, to be run."""

    source: str


@dataclass(frozen=True)
class Asked:
    """A place where an exercise is marked, with the names that are there by then."""

    exercise: Task | Question


def mark(
    steps: Sequence[Cell | Asked],
    seed: int,
    limits: Limits | None = None,
    course: Path | None = None,
) -> list[Note | Answer]:
    """Run the cells of a notebook in another process, and mark its exercises."""
    session = Session(limits or Limits(), course)
    try:
        return [
            answer(session, step.exercise, seed)
            if isinstance(step, Asked)
            else session.run(step.source)
            for step in steps
        ]
    finally:
        session.close()


def answer(session: Session, exercise: Task | Question, seed: int) -> Answer:
    """Mark an exercise; whatever a student's process does, there is an answer."""
    try:
        if isinstance(exercise, Task):
            said = answer_to_task(session, exercise, seed)
        else:
            said = answer_to_question(session, exercise)
        return missing(session, exercise) if said is None else said
    except Stopped as stop:
        return Answer(exercise.name, "stopped", (Part(f"**{stop.why}**"),))
    except Exception as problem:  # a hostile result may do anything to what reads it
        said = f"What it gave back cannot be judged: {str(problem)[:300]}"
        return Answer(exercise.name, "stopped", (Part(said),))


def missing(session: Session, exercise: Task | Question) -> Answer:
    """Say that there is nothing to mark, and which cells may be why."""
    kind = "variable" if isinstance(exercise, Question) else "function"
    said = Part(f"**There is no {kind} `{exercise.name}` at this cell.**")
    wrong = [note.part() for note in session.notes if note.kind != "ran"]
    return Answer(exercise.name, "missing", (said, *wrong[-3:]))


def answer_to_question(session: Session, question: Question) -> Answer | None:
    """Judge a letter; None if there is none."""
    told = session.ask({"ask": "value", "name": question.name}, session.limits.call)
    if told.get("kind") == "missing":
        return None
    letter = wire.value_of(told.get("value"))
    try:
        return check_choice(
            question, letter if isinstance(letter, str) else "no letter"
        )
    except ValueError:
        letters = ", ".join(question.choices)
        said = f"It takes one of {letters}, in quotes; yours is `{str(letter)[:80]}`."
        return Answer(question.name, "choice", (Part(said),))


def answer_to_task(session: Session, task: Task, seed: int) -> Answer | None:
    """Judge what a function does on hidden inputs; None if there is no function."""
    cases = task.inputs(seed)
    names = list(inspect.signature(task.solution).parameters)
    limit = session.limits.call
    question = {"ask": "call", "name": task.name, "parameters": names, "cases": cases}
    told = session.ask({**question, "seconds": limit}, 2 * limit * len(cases))
    if told.get("kind") == "missing":
        return None
    if told.get("kind") == "signature":
        return Answer(task.name, "signature", (Part(str(told.get("error"))[:2000]),))
    if told.get("kind") != "called":
        raise ValueError(str(told.get("error") or "it told nothing"))
    pairs = zip(told["outcomes"], cases, strict=False)
    outcomes = [outcome_of(one, case) for one, case in pairs]
    complete = len(outcomes) == len(cases)
    if not complete and (not outcomes or outcomes[-1].kind != "timed out"):
        raise ValueError(f"{len(outcomes)} results for {len(cases)} inputs")
    return judge(task, cases, outcomes, seed)


def outcome_of(told: Any, case: tuple[Any, ...]) -> Outcome:
    """Read what a process says of one call.

    Raises:
        ValueError: it says something else.
    """
    given = told if isinstance(told, dict) else {}
    kind, changed, steady = (given.get(k) for k in ("kind", "changed", "steady"))
    places = range(len(case))
    if (
        kind not in ("returned", "raised", "timed out")
        or not isinstance(changed, list)
        or not all(type(i) is int and i in places for i in changed)
        or not isinstance(steady, bool)
    ):
        raise ValueError(f"no outcome: {str(told)[:80]}")
    texts = {k: str(given.get(k, ""))[:2000] for k in ("error", "line", "printed")}
    value = wire.value_of(given.get("value"))
    return Outcome(kind, value, changed=tuple(changed), steady=steady, **texts)
