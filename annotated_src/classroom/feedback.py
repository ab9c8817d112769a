"""Answers and notes as feedback shows them."""

from __future__ import annotations

import re
from typing import Any

from nbformat.v4 import new_output

from annotated_src.checks.answers import Answer, Link, Part
from annotated_src.classroom.session import Note


def answer_markdown(answer: Answer, book: str = "") -> str:
    """Write an answer for a page that stands nowhere near the notebooks."""
    parts = [f"**{answer.headline}**"]
    for part in answer.parts:
        link = f" {link_to(part.link, book)}" if part.link else ""
        parts.append(Part(part.text + link, part.code).markdown())
    return "\n\n".join(parts)


def link_to(link: Link, book: str) -> str:
    """Link to a section on the web, or say where it is."""
    if not book:
        return str(link)
    page = f"{book.rstrip('/')}/notebooks/{link.chapter}.html"
    anchor = re.sub(r"[^\w\- ]", "", link.section.lower()).replace(" ", "-")
    return f"[{link.section}]({page}#{anchor})"


def answer_outputs(answer: Answer, points: float, number: int, book: str) -> list[Any]:
    """Write the outputs of a marked cell: the answer, then points, for nbgrader."""
    shown = {"text/markdown": answer_markdown(answer, book), "text/plain": repr(answer)}
    result = {"text/plain": str(points if answer else 0)}
    return [
        new_output("display_data", data=shown),
        new_output("execute_result", data=result, execution_count=number),
    ]


def note_outputs(note: Note) -> list[Any]:
    """Write the outputs of a student's cell: what it printed, and how it ended."""
    outputs = []
    if note.printed:
        outputs.append(new_output("stream", name="stdout", text=note.printed))
    if note.kind != "ran":
        name, _, words = note.error.partition(": ")
        if note.kind == "timed out":
            name, words = "Timeout", "the cell did not come to an end in time"
        if note.kind == "stopped":
            name, words = "Stopped", note.error
        lines = [f"{name}: {words}", *([note.line] if note.line else [])]
        outputs.append(new_output("error", ename=name, evalue=words, traceback=lines))
    return outputs
