"""The exercises of one chapter, in order; each chapter of the book has a module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from annotated_src.checks.exercise import Function, Question, Task
from annotated_src.checks.statement import solution_markdown, statement_markdown


class Shown:
    """Markdown, for a notebook and for the book."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


class Chapter:
    """The exercises of a chapter, in order. `path` is its place: "llama/04_rope"."""

    def __init__(self, path: str, title: str) -> None:
        self.path, self.title = path, title
        self.exercises: list[Task | Question] = []

    def __getitem__(self, name: str) -> Task | Question:
        """Give the exercise of a name.

        Raises:
            KeyError: the chapter has none of this name.
        """
        for exercise in self.exercises:
            if exercise.name == name:
                return exercise
        names = ", ".join(e.name for e in self.exercises)
        raise KeyError(f"{self.path} has no exercise {name!r}; it has {names}")

    def show(self, name: str) -> Shown:
        """Show an exercise: the task, and hints that open one after the other."""
        exercise = self[name]
        return Shown(statement_markdown(exercise, self.exercises.index(exercise) + 1))

    def solution(self, name: str) -> Shown:
        """Show the solution of an exercise, and why it is one."""
        return Shown(solution_markdown(self[name]))

    def __iter__(self) -> Iterator[Task | Question]:
        return iter(self.exercises)

    def implement(self, **about: Any) -> Callable[[Function], Task]:
        """Make a task of its solution. A decorator; see Task and Exercise."""
        return functools.partial(self.task, "implement", about)

    def debug(self, **about: Any) -> Callable[[Function], Task]:
        """Make a task of the repaired function. A decorator; see Task and Exercise."""
        return functools.partial(self.task, "debug", about)

    def task(self, kind: str, about: dict[str, Any], solution: Function) -> Task:
        """Add a task, named as its solution is."""
        made = Task(
            kind=kind,
            name=solution.__name__,
            solution=solution,
            chapter=self.path,
            **about,
        )
        self.exercises.append(made)
        return made

    def explain(self, name: str, **about: Any) -> Question:
        """Add a question; see Question and Exercise."""
        made = Question(name=name, chapter=self.path, **about)
        self.exercises.append(made)
        return made
