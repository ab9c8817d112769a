"""Write what a class needs: notebooks to solve, solved ones, an nbgrader course."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.diagnosis import check_function
from annotated_src.checks.exercise import Task
from annotated_src.classroom.notebooks import KINDS, notebook_of, written
from annotated_src.exercises import CHAPTERS

CONFIG = '''\
"""nbgrader's settings for this course. The seed draws the hidden inputs: keep it."""

from annotated_src.classroom.settings import configure

configure(get_config(), seed={seed}, book={book!r})  # noqa: F821
'''


def chapter_named(name: str) -> Chapter:
    """Find a chapter by the name of its exercises, such as "heads".

    Raises:
        ValueError: there is none of this name.
    """
    if name not in CHAPTERS:
        raise ValueError(f"there is no chapter {name!r}; there are {list(CHAPTERS)}")
    return importlib.import_module(f"annotated_src.exercises.{name}").chapter


def build(
    out: Path, names: Sequence[str] = CHAPTERS, seed: int = 1, book: str = ""
) -> list[Path]:
    """Write the notebooks and the course below a folder; return what was written.

    All else that is there stays: other chapters, a gradebook, what students handed in.

    Raises:
        ValueError: there is no such chapter, or the seed is that of `check`.
    """
    if seed == 0:
        raise ValueError("seed 0 draws what `check` shows to students; take another")
    chapters = {name: chapter_named(name) for name in names}
    files: dict[Path, bytes] = {}
    for name, chapter in chapters.items():
        number = CHAPTERS.index(name) + 1
        pages = [written(notebook_of(chapter, number, kind, book)) for kind in KINDS]
        places = (
            Path("student", f"{name}.ipynb"),
            Path("solutions", f"{name}.ipynb"),
            Path("course", "source", name, f"{name}.ipynb"),
        )
        files |= dict(zip(places, pages, strict=True))
    config = CONFIG.format(seed=seed, book=book)
    files[Path("course", "nbgrader_config.py")] = config.encode("utf-8")
    for place, data in files.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_bytes(data)
    return [out / place for place in files]


def prove(names: Sequence[str], seed: int) -> int:
    """Run solutions and mistakes on the inputs of a seed; return how many there were.

    Raises:
        ValueError: the seed's inputs let a mistake pass, or stop a right solution.
    """
    count = 0
    for name in names:
        for task in chapter_named(name):
            if not isinstance(task, Task):
                continue
            right = {"the solution": task.solution, **task.others}
            wrong = {m.name: m.function for m in task.mistakes}
            for title, function in {**right, **wrong}.items():
                passes = bool(check_function(task, function, seed))
                if passes != (title in right):
                    said = "passes" if passes else "fails"
                    raise ValueError(f"seed {seed}: {task.name}, {title!r}, {said}")
                count += 1
    return count
