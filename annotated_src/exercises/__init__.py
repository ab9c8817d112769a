"""Exercises that answer back: `check(my_function)`, `check("question", "b")`.

One module for each chapter. `progress()` shows what is solved.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from annotated_src.checks.answers import Answer, Part
from annotated_src.checks.chapter import Chapter
from annotated_src.checks.diagnosis import check_choice, check_function
from annotated_src.checks.exercise import Question, Task
from annotated_src.checks.progress import Progress, record

CHAPTERS = (
    *(
        "reading",
        "activations",
        "norms",
        "rope",
        "attention",
        "heads",
        "cache",
        "llama",
    ),
    *("blanks", "prefix_mask", "rope_2d", "half_precision", "block", "prefix_tuning"),
    *("chatglm", "errata"),
    *("checkpoint", "from_pretrained", "tokens", "decoding", "sampling", "pipeline"),
    *("training", "authoring", "mapping", "quantizing", "exporting", "on_device"),
)


def chapters() -> list[Chapter]:
    """Give the exercises of every chapter, in the book's order."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in CHAPTERS)
    return [module.chapter for module in modules]


def find(name: str) -> Task | Question:
    """Find an exercise by name; a leading `my_` is ignored.

    Raises:
        ValueError: there is none of this name.
    """
    known = {exercise.name: exercise for chapter in chapters() for exercise in chapter}
    if found := known.get(name) or known.get(name.removeprefix("my_")):
        return found
    near = difflib.get_close_matches(name.removeprefix("my_"), known, n=3)
    hint = "a function has the name of its exercise"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise ValueError(f"there is no exercise {name!r}; {hint}")


def check(attempt: Callable[..., Any] | str, choice: str | None = None) -> Answer:
    """Check a function against the exercise of its name, or a choice for a question.

    Let it be the last line of a cell, or print it. It takes less than a second, or a
    few for a loop that does not end, and notes what is solved for `progress()`.

    Raises:
        TypeError: the attempt is no function, or a choice is missing.
        ValueError: there is no such exercise, or no such choice.
    """
    if isinstance(attempt, str):
        answer = answer_choice(attempt, choice)
    elif callable(attempt) and hasattr(attempt, "__name__"):
        answer = answer_function(attempt)
    else:
        raise TypeError(f"check wants a function or a question's name, got {attempt!r}")
    try:
        record(answer.exercise, bool(answer))
    except OSError as problem:
        note = Part(f"(Progress could not be kept: {problem}.)")
        return dataclasses.replace(answer, parts=(*answer.parts, note))
    return answer


def answer_choice(name: str, choice: str | None) -> Answer:
    """Answer a letter for a question."""
    question = find(name)
    if not isinstance(question, Question):
        raise TypeError(f"{name} wants a function: check({name}), without quotes")
    if choice is None:
        raise TypeError(f'{name} is checked by check("{name}", "a")')
    return check_choice(question, str(choice))


def answer_function(function: Callable[..., Any]) -> Answer:
    """Answer a function, by its name."""
    task = find(function.__name__)
    if not isinstance(task, Task):
        raise TypeError(f'{task.name} is a question: check("{task.name}", "a")')
    if (inspect.unwrap(function).__module__ or "").startswith("annotated_src."):
        note = Part("This is the book's own function. Define yours in a cell first.")
        return Answer(task.name, "unfinished", (note,))
    return check_function(task, function)


def progress() -> Progress:
    """Show a map of the chapters with what is solved."""
    return Progress(chapters())
