"""Notebooks from the exercises of a chapter: the student's, the solved, nbgrader's."""

from __future__ import annotations

from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Question, Task
from annotated_src.checks.source import imports_of, source_of
from annotated_src.checks.statement import (
    head_markdown,
    hints_markdown,
    starting_code,
)
from annotated_src.classroom.marking import points_of
from annotated_src.classroom.names import grade_id_of

HIDDEN = """\
### BEGIN HIDDEN TESTS
raise RuntimeError("nbgrader_config.py names what marks this; it was not used")
### END HIDDEN TESTS"""
INTRODUCTION = """\
# {title}: exercises

They belong to chapter {number} of *Decoders, Taken Apart*: {link}. About {minutes}
minutes, {points} points.

Run the cell of imports first. Then, for each exercise, write your answer into the cell
below the task: a function, or a letter. Keep the name that it has. The cell after it
checks your answer and says what is wrong: run it as often as you like, and leave it as
it is. Marks are given in the same way, for other inputs; an exercise counts in full or
not at all."""
KINDS = ("student", "solution", "source")


def notebook_of(chapter: Chapter, number: int, kind: str, book: str = "") -> Any:
    """Make a chapter's notebook: "student", "solution", or "source" for nbgrader.

    `book` is where the rendered book stands on the web, if it does.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a notebook is one of {KINDS}, got {kind!r}")
    cells = [introduction(chapter, number, book), imports_cell(chapter, kind)]
    for place, exercise in enumerate(chapter, 1):
        cells += exercise_cells(exercise, place, kind)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=metadata)


def written(notebook: Any) -> bytes:
    """Write a notebook as bytes, the same each time.

    Raises:
        nbformat.ValidationError: it is no notebook.
    """
    nbformat.validate(notebook)
    return (nbformat.writes(notebook) + "\n").encode("utf-8")


def introduction(chapter: Chapter, number: int, book: str) -> Any:
    """Make the first cell: which chapter, how long, how it goes."""
    place = f"`notebooks/{chapter.path}.ipynb`"
    page = f"[{chapter.title}]({book.rstrip('/')}/notebooks/{chapter.path}.html)"
    text = INTRODUCTION.format(
        title=chapter.title,
        number=number,
        link=page if book else place,
        minutes=sum(e.minutes for e in chapter),
        points=sum(map(points_of, chapter)),
    )
    return new_markdown_cell(text, id="introduction")


def imports_cell(chapter: Chapter, kind: str) -> Any:
    """Make the cell of imports that all exercises of the chapter share."""
    lines = ["from annotated_src.exercises import check"]
    tasks = [e for e in chapter if isinstance(e, Task)]
    if tasks and (found := imports_of(tasks[0].solution)):
        lines = [found, "", *lines]
    return graded_cell("imports", "\n".join(lines), kind, locked=True)


def exercise_cells(exercise: Task | Question, place: int, kind: str) -> list[Any]:
    """Make an exercise's cells: what is asked, the answer, the check."""
    name, points = exercise.name, points_of(exercise)
    code = starter(exercise) if kind == "student" else solved(exercise)
    cells = [
        new_markdown_cell(asked(exercise, place), id=f"{name[:50]}-task"),
        graded_cell(name, code, kind, solution=True),
        graded_cell(grade_id_of(name), check_code(exercise, kind), kind, points=points),
    ]
    if kind == "solution" and (why := explanation(exercise)):
        cells.append(new_markdown_cell(why, id=f"{name[:50]}-why"))
    return cells


def asked(exercise: Task | Question, place: int) -> str:
    """Write what is asked. It does not say which choice is right, as a chapter does."""
    parts = [head_markdown(exercise, place), exercise.text.strip()]
    if isinstance(exercise, Question):
        lines = [f"- {key}) {choice.text}" for key, choice in exercise.choices.items()]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, hints_markdown(exercise)])


def starter(exercise: Task | Question) -> str:
    """Write what the student begins with: a stub, the broken function, or no letter."""
    if isinstance(exercise, Question):
        letters = ", ".join(exercise.choices)
        return f'{exercise.name} = "?"  # one of {letters}'
    return starting_code(exercise)


def solved(exercise: Task | Question) -> str:
    """Write the solution."""
    if isinstance(exercise, Question):
        return f'{exercise.name} = "{exercise.right}"'
    return source_of(exercise.solution, exercise.name)


def explanation(exercise: Task | Question) -> str:
    """Say why the solution is one."""
    if isinstance(exercise, Question):
        right = exercise.choices[exercise.right].answer
        return f"{right}\n\n{exercise.why}".strip()
    return exercise.why.strip()


def check_code(exercise: Task | Question, kind: str) -> str:
    """Write the check. Its last line is the number that nbgrader reads."""
    name, points = exercise.name, points_of(exercise)
    attempt = f'"{name}", {name}' if isinstance(exercise, Question) else name
    lines = [f"answer = check({attempt})", "display(answer)"]
    lines.append(f"{points} * bool(answer)  # of {points}")
    return "\n".join([*lines, HIDDEN] if kind == "source" else lines)


def graded_cell(
    name: str,
    code: str,
    kind: str,
    solution: bool = False,
    locked: bool = False,
    points: int = 0,
) -> Any:
    """Make a cell that nbgrader knows by a name."""
    about: dict[str, Any] = {"grade": points > 0, "grade_id": name}
    about |= {"locked": locked or points > 0, "solution": solution}
    about |= {"schema_version": 3, "task": False}
    if points:
        about["points"] = points
    metadata: dict[str, Any] = {"nbgrader": about}
    if kind != "solution":  # in "Run All", one error does not stop the cells below
        metadata["tags"] = ["raises-exception"]
    if kind == "student":
        metadata["deletable"] = False
        if not solution:
            metadata["editable"] = False
    return new_code_cell(code, id=name[:60], metadata=metadata)
