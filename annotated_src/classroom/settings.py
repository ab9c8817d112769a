"""What nbgrader is told in a course's nbgrader_config.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from nbgrader.converters import Autograde, GenerateAssignment
from nbgrader.preprocessors import ClearSolutions, Execute, OverwriteCells

from annotated_src.classroom.pages import OfflineHTML
from annotated_src.classroom.preprocessors import GiveStarters, RestoreCells

REPLACED = {
    ClearSolutions: GiveStarters,
    OverwriteCells: RestoreCells,
    Execute: "annotated_src.classroom.apart.MarkApart",  # named, as it needs torch
}
# What students hand in through a learning platform: ada_heads.ipynb is Ada's "heads".
# Chapters are listed, as van_der_berg_rope_2d.ipynb could be cut in five places.
CHAPTERS = sorted(
    path.stem for path in Path(__file__).parents[1].glob("exercises/[!_]*.py")
)
NAMED = rf".*[/\\](?P<student_id>[^/\\]+)_(?P<file_id>{'|'.join(CHAPTERS)})\.ipynb$"


def configure(
    c: Any, *, seed: int, book: str = "", course_id: str = "decoders"
) -> None:
    """Let nbgrader give out starters, mark in a process apart, and ask no network.

    `seed` draws the hidden inputs; `book` is where the rendered book stands on the web,
    if it does. Everything else of nbgrader can be set beside it.
    """
    # of SQLAlchemy, about nbgrader's own code; a teacher can do nothing about it
    warnings.filterwarnings("ignore", r"Object of type <\w+> not in session")
    c.CourseDirectory.course_id = course_id
    c.GenerateAssignment.preprocessors = replaced(GenerateAssignment.preprocessors)
    c.Autograde.sanitize_preprocessors = replaced(Autograde.sanitize_preprocessors)
    c.Autograde.autograde_preprocessors = replaced(Autograde.autograde_preprocessors)
    c.MarkApart.seed = seed
    c.MarkApart.book = book
    c.GenerateFeedback.exporter_class = OfflineHTML
    c.FileNameCollectorPlugin.named_regexp = NAMED


def replaced(trait: Any) -> list[Any]:
    """Give the steps that nbgrader takes, with ours in the places of its own."""
    return [REPLACED.get(step, step) for step in trait.default_args[0]]
