"""The minutes in the teacher's guide, from chapters and exercises."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from annotated_src.checks.answers import NOTEBOOKS
from annotated_src.checks.chapter import Chapter
from annotated_src.classroom.marking import points_of
from annotated_src.exercises import CHAPTERS, chapters

START, END = "<!-- minutes -->", "<!-- end of minutes -->"


def card_of(path: str) -> tuple[str, int]:
    """Read a chapter's label in the book, and the minutes that its card says.

    Raises:
        ValueError: the chapter has no label, or no card.
    """
    text = (NOTEBOOKS / f"{path}.py").read_text("utf-8")
    label = re.search(r"^# \((ch-[a-z0-9-]+)\)=$", text, re.M)
    minutes = re.search(r"^# \*\*(\d+) minutes", text, re.M)
    if not label or not minutes:
        raise ValueError(f"{path} has no label, or no card with minutes")
    return label[1], int(minutes[1])


def minutes_table(every: Iterable[Chapter]) -> str:
    """Write a row for each chapter: minutes to read, exercises with minutes, sums."""
    head = "| | Chapter | Assignment | Reading | Exercises | Together | Points |"
    rows = [head, "|--|--|--|--|--|--|--|"]
    totals = [0, 0, 0, 0]
    for number, (name, chapter) in enumerate(zip(CHAPTERS, every, strict=True), 1):
        label, reading = card_of(chapter.path)
        each = ", ".join(f"`{e.name}` {e.minutes}" for e in chapter)
        took = sum(e.minutes for e in chapter)
        worth = sum(map(points_of, chapter))
        row = [number, f"{{ref}}`{label}`", f"`{name}`", reading, f"{each}: {took}"]
        rows.append(f"| {' | '.join(map(str, [*row, reading + took, worth]))} |")
        sums = zip(totals, (reading, took, reading + took, worth), strict=True)
        totals = [old + new for old, new in sums]
    last = f"| | All | | {' | '.join(map(str, totals))} |"
    return "\n".join([*rows, last])


def minutes_in_plans(text: str, every: Iterable[Chapter]) -> str:
    """Write what the chapters of a week or a day take into the last cell of its row.

    "120–150": as the table says, and with half as many minutes again for exercises.
    """
    took = {}
    for chapter in every:
        label, reading = card_of(chapter.path)
        took[label] = (reading, sum(e.minutes for e in chapter))

    def row(found: re.Match[str]) -> str:
        parts = [took[label] for label in re.findall(r"\{ref\}`(.+?)`", found[1])]
        least = sum(map(sum, parts))
        return f"{found[1]} {least}–{least + sum(e for _, e in parts) // 2} |"

    return re.sub(r"^(\| \d+ \|.*\|) [\d–]+ \|$", row, text, flags=re.M)


def updated(text: str, every: Iterable[Chapter]) -> str:
    """Bring the plans above a page's marks, and the table between them, up to date.

    Raises:
        ValueError: the page has no such marks.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page lacks {START} or {END}")
    every = list(every)
    plans, table = minutes_in_plans(before, every), minutes_table(every)
    return f"{plans}{START}\n\n{table}\n\n{END}{after}"


def update(page: Path) -> None:
    """Bring the minutes of a page up to date."""
    text = updated(page.read_text("utf-8"), chapters())
    page.write_text(text, "utf-8")
