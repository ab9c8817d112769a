"""The step of nbgrader's that would run student code, replaced: mark it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbgrader import utils
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Float, Integer, Unicode

from annotated_src.checks.answers import Answer
from annotated_src.classroom.child import Limits
from annotated_src.classroom.course import chapter_named
from annotated_src.classroom.feedback import answer_outputs, note_outputs
from annotated_src.classroom.inside import landlock
from annotated_src.classroom.marking import Asked, Cell, mark, points_of
from annotated_src.classroom.names import grade_id_of


class MarkApart(NbGraderPreprocessor):
    """Run students' cells in a process of their own; judge in ours what they did."""

    seed = Integer(1, help="draws the hidden inputs").tag(config=True)
    book = Unicode("", help="where the book stands on the web").tag(config=True)
    cell_seconds = Float(Limits.cell, help="for a cell").tag(config=True)
    call_seconds = Float(Limits.call, help="for one call").tag(config=True)
    notebook_seconds = Float(Limits.notebook, help="for all of it").tag(config=True)
    memory = Integer(Limits.memory, help="MiB, beside torch").tag(config=True)

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """Mark a notebook: its outputs become what nbgrader reads points from."""
        exercises = {
            grade_id_of(exercise.name): exercise
            for exercise in chapter_named(resources["nbgrader"]["notebook"])
        }
        cells = [cell for cell in nb.cells if cell.cell_type == "code"]
        steps: list[Asked | Cell] = []
        for cell in cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
            is_asked = utils.is_grade(cell) and name in exercises
            steps.append(Asked(exercises[name]) if is_asked else Cell(cell.source))
        if not landlock.offered():
            self.log.warning("No Landlock here: only Python keeps files from students")
        limits = Limits(
            self.cell_seconds, self.call_seconds, self.notebook_seconds, self.memory
        )
        found = mark(steps, self.seed, limits, Path.cwd())
        for number, (cell, step, said) in enumerate(
            zip(cells, steps, found, strict=True), 1
        ):
            cell.execution_count = number
            if isinstance(step, Asked) and isinstance(said, Answer):
                cell.source = cell.source.partition("\n### BEGIN HIDDEN")[0]
                points = points_of(step.exercise)
                cell.outputs = answer_outputs(said, points, number, self.book)
            elif not isinstance(said, Answer):
                cell.outputs = note_outputs(said)
        return nb, resources
