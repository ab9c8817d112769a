"""An exercise as the book shows it: the task, two hints, then the solution."""

from __future__ import annotations

import re
from html import escape

from annotated_src.checks.exercise import Exercise, Question, Task
from annotated_src.checks.source import TO_DO, body_of, source_of, starter_of


def folded(summary: str, body: str, kind: str) -> str:
    """Write something that opens with a click."""
    head = f'<details class="{kind}"><summary>{summary}</summary>'
    return f"{head}\n\n{body.strip()}\n\n</details>"


def as_html(line: str) -> str:
    """Write a line with code in it for a summary, where Markdown does not reach."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(line, quote=False))


def head_markdown(exercise: Exercise, number: int) -> str:
    """Write an exercise's first line: number, kind, title, minutes, difficulty."""
    about = f"{exercise.minutes} minutes, {exercise.difficulty}"
    return f"**{number}. {exercise.kind.capitalize()}: {exercise.title}** ({about})"


def hints_markdown(exercise: Exercise) -> str:
    """Write the hints, the second one inside the first."""
    first, second = exercise.hints
    inner = folded("Second hint", second, "hint")
    return folded("Hint", f"{first.strip()}\n\n{inner}", "hint")


def question_markdown(question: Question) -> str:
    """Write a question's choices; each opens its own answer."""
    return "\n\n".join(
        folded(
            f"{letter}) {as_html(choice.text)}",
            ("✓ " if letter == question.right else "✗ ") + choice.answer,
            "choice",
        )
        for letter, choice in question.choices.items()
    )


def task_markdown(exercise: Exercise) -> str:
    """Write what is to be done, with the function to start from."""
    text = exercise.text.strip()
    if not isinstance(exercise, Task):
        return text
    return f"{text}\n\n```python\n{starting_code(exercise)}\n```"


def starting_code(task: Task) -> str:
    """Give the function to start from: a stub, or the broken one."""
    code = starter_of(task.solution, task.name)
    if task.given:
        body = body_of(source_of(task.given, task.name))
        code = f"{code.removesuffix(TO_DO)}{body}"
    return code


def statement_markdown(exercise: Exercise, number: int) -> str:
    """Write an exercise for a page: head, task, choices, hints."""
    parts = [head_markdown(exercise, number), task_markdown(exercise)]
    if isinstance(exercise, Question):
        parts.append(question_markdown(exercise))
    parts.append(hints_markdown(exercise))
    return "\n\n".join(parts)


def solution_markdown(exercise: Exercise) -> str:
    """Write the solution, and why it is one."""
    if isinstance(exercise, Question):
        right = exercise.choices[exercise.right]
        words = f"**{exercise.right}) {right.text}** {right.answer}"
        return f"{words}\n\n{exercise.why}".strip()
    if not isinstance(exercise, Task):
        raise TypeError(f"a task or a question was expected, got {exercise!r}")
    code = source_of(exercise.solution, exercise.name)
    return f"{exercise.why}\n\n```python\n{code}\n```".strip()
