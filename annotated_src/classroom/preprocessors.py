"""Two steps of nbgrader's, replaced: give out, and restore. Light to import."""

from __future__ import annotations

from typing import Any

from nbformat.v4 import new_code_cell
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.preprocessors import ClearSolutions, OverwriteCells

from annotated_src.classroom.names import grade_id_of

Made = tuple[Any, Any]


class GiveStarters(ClearSolutions):
    """Put in place of a solution what students start from: for debug, broken code.

    A cell that is no exercise's is cleared as nbgrader clears it.
    """

    def preprocess_cell(self, cell: Any, resources: Any, cell_index: int) -> Made:
        """Clear one cell."""
        # here, as every command of nbgrader reads the settings, and few need torch
        from annotated_src.classroom.course import chapter_named
        from annotated_src.classroom.notebooks import starter

        chapter = chapter_named(resources["nbgrader"]["notebook"])
        starters = {exercise.name: starter(exercise) for exercise in chapter}
        about = cell.metadata.get("nbgrader", {})
        if about.get("solution") and about.get("grade_id") in starters:
            cell.source = starters[about["grade_id"]]
            return cell, resources
        return super().preprocess_cell(cell, resources, cell_index)


class RestoreCells(OverwriteCells):
    """Put back cells that are marked or locked, whatever a student did to them.

    nbgrader's own way fails when the cell before is missing too, and on cells whose
    names it does not know.
    """

    def preprocess(self, nb: Any, resources: Any) -> Made:
        """Restore a notebook's cells."""
        notebook = resources["nbgrader"]["notebook"]
        assignment = resources["nbgrader"]["assignment"]
        with Gradebook(resources["nbgrader"]["db_url"]) as gradebook:
            source = gradebook.find_notebook(notebook, assignment)
            known = {str(c.name): c for c in source.source_cells}
            marked = {str(c.name): float(c.max_score) for c in source.grade_cells}
            answers = {str(c.name) for c in source.solution_cells}
            self.forget_unknown(nb, known, marked, answers)
            missing = [name for name in known if name not in answers | places_of(nb)]
            for name in missing:
                self.log.warning("Cell '%s' was missing and is put back", name)
                insert(nb, graded_cell(name, str(known[name].source), marked), name)
        return super().preprocess(nb, resources)

    def forget_unknown(
        self,
        nb: Any,
        known: dict[str, Any],
        marked: dict[str, float],
        answers: set[str],
    ) -> None:
        """Make plain cells of those that pretend to be nbgrader's; mend the others."""
        for cell in nb.cells:
            about = cell.metadata.get("nbgrader")
            if about is None:
                continue
            name = about.get("grade_id") if isinstance(about, dict) else None
            if name not in known:
                self.log.warning("A cell has a name that is not ours: %r", name)
                del cell.metadata["nbgrader"]
                continue
            if known[name].locked:  # here, as nbgrader would warn: hidden tests are new
                cell.source = str(known[name].source)
            about.update(grade=name in marked, solution=name in answers)
            about.update(locked=known[name].locked, task=False, schema_version=3)
            about.pop("points", None)
            if name in marked:
                about["points"] = marked[name]


def places_of(nb: Any) -> set[str]:
    """Give the names that nbgrader has for the cells of a notebook."""
    abouts = (cell.metadata.get("nbgrader", {}) for cell in nb.cells)
    return {about["grade_id"] for about in abouts if about.get("grade_id")}


def graded_cell(name: str, source: str, marked: dict[str, float]) -> Any:
    """Make a cell again that is marked, or only locked."""
    about = {"grade_id": name, "locked": True, "solution": False, "task": False}
    about |= {"grade": name in marked, "schema_version": 3}
    about |= {"points": marked[name]} if name in marked else {}
    return new_code_cell(source, metadata={"nbgrader": about})


def insert(nb: Any, cell: Any, name: str) -> None:
    """Put a missing cell below the answer that it marks, at the end, or on top."""
    places = [
        place
        for place, other in enumerate(nb.cells)
        if grade_id_of(other.metadata.get("nbgrader", {}).get("grade_id", "")) == name
    ]
    end = len(nb.cells) if utils.is_grade(cell) else 0
    nb.cells.insert(places[-1] + 1 if places else end, cell)
