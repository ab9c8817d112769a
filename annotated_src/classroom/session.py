"""A notebook on its way through processes: what ends one is left out of the next."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_src.checks.answers import Part
from annotated_src.classroom.child import Child, Limits, Stopped

GRACE = 5.0


@dataclass(frozen=True)
class Note:
    """What running a cell did; `kind` is "ran", "raised", "timed out" or "stopped"."""

    kind: str
    error: str = ""
    line: str = ""
    printed: str = ""

    def part(self) -> Part:
        """Say it in an answer, when it went wrong."""
        at = f", in {self.line}" if self.line else ""
        if self.kind == "timed out":
            return Part("A cell before this one did not come to an end in time.")
        return Part(f"A cell before this one stopped: `{self.error}`{at}")


class Session:
    """The cells of a notebook, and the process in which they have been run so far."""

    def __init__(self, limits: Limits, course: Path | None = None) -> None:
        self.limits, self.course = limits, course
        self.end = time.monotonic() + limits.notebook
        self.cells: list[str] = []
        self.notes: list[Note] = []
        self.left_out: set[int] = set()
        self.child: Child | None = None

    def close(self) -> None:
        """End the process; the next question begins another."""
        if self.child is not None:
            self.child.close()
        self.child = None

    def run(self, source: str) -> Note:
        """Run the next cell, and note what it did."""
        number = len(self.cells)
        self.cells.append(source)
        try:
            self.catch_up(number)
            note = self.run_cell(number)
        except Stopped as stop:
            self.left_out.add(number)
            note = Note("stopped", stop.why)
        self.notes.append(note)
        return note

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask the process, after all cells so far.

        Raises:
            Stopped: it ended, or the time for the notebook is over.
        """
        self.catch_up(len(self.cells))
        return self.sent(question, seconds)

    def catch_up(self, number: int) -> None:
        """Begin another process if there is none, and run the cells before `number`.

        Raises:
            Stopped: the time for the notebook is over.
        """
        while self.child is None:
            self.left()
            self.child = Child(self.limits, self.course)
            for before in range(number):
                if before not in self.left_out and self.child is not None:
                    try:
                        self.run_cell(before)
                    except Stopped:
                        self.left_out.add(before)

    def run_cell(self, number: int) -> Note:
        """Run a cell in the process that is there.

        Raises:
            Stopped: the process ended, or the time for the notebook is over.
        """
        limit = self.limits.cell
        question = {"ask": "run", "source": self.cells[number], "number": number + 1}
        told = self.sent({**question, "seconds": limit}, limit)
        known = told.get("kind") in ("ran", "raised", "timed out")
        texts = (str(told.get(k, ""))[:2000] for k in ("error", "line", "printed"))
        if not known:
            self.close()
            raise Stopped("It sent something unreadable.")
        note = Note(told["kind"], *texts)
        if note.kind == "timed out":  # not again, should it come to that
            self.left_out.add(number)
        if note.error.startswith("MemoryError"):  # it may still hold what it took
            self.left_out.add(number)
            self.close()
        return note

    def sent(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a question to the process that is there.

        Raises:
            Stopped: the process ended, or the time for the notebook is over.
        """
        if self.child is None:
            raise Stopped("The process had ended.")
        try:
            told = self.child.ask(question, min(seconds + GRACE, self.left()))
        except Stopped:
            self.close()
            raise
        if told.get("busy"):  # something in it goes on; the next question is not for it
            self.close()
        return told

    def left(self) -> float:
        """Give the seconds that the notebook may still take.

        Raises:
            Stopped: there are none.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            self.close()
            raise Stopped("The time for the whole notebook was over.")
        return left
