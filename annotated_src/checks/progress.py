"""What a reader has solved, in a small file that no crash leaves half written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_data_path

from annotated_src.checks.chapter import Chapter

PLACE = "ANNOTATED_SRC_PROGRESS"


def progress_file() -> Path:
    """Say where progress is kept; the variable ANNOTATED_SRC_PROGRESS moves it."""
    if place := os.environ.get(PLACE):
        return Path(place)
    return user_data_path("annotated-src", appauthor=False) / "progress.json"


def read_progress(file: Path) -> dict[str, dict[str, Any]]:
    """Read what is solved. A file that is damaged is kept aside, and never lost."""
    try:
        stored = json.loads(file.read_text("utf-8"))
        entries = stored["exercises"]
        if all(
            isinstance(e["solved"], bool) and e["attempts"] >= 0
            for e in entries.values()
        ):
            return entries
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    file.replace(file.with_suffix(".damaged"))
    return {}


def record(name: str, solved: bool) -> None:
    """Note an attempt: the new file is whole on disk before it replaces the old.

    Raises:
        OSError: the file cannot be written.
    """
    file = progress_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=5):
        entries = read_progress(file)
        before = entries.get(name, {"attempts": 0, "solved": False})
        entries[name] = {
            "attempts": before["attempts"] + 1,
            "solved": before["solved"] or solved,
        }
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False
        ) as part:
            json.dump({"exercises": entries}, part, indent=1, sort_keys=True)
            part.flush()
            os.fsync(part.fileno())
        Path(part.name).replace(file)


class Progress:
    """A map of the chapters: a filled dot for each exercise that is solved."""

    def __init__(self, chapters: Iterable[Chapter]) -> None:
        solved = {n for n, e in read_progress(progress_file()).items() if e["solved"]}
        self.rows = [
            (c.title, "".join("●" if e.name in solved else "○" for e in c))
            for c in chapters
        ]

    @property
    def solved(self) -> int:
        """How many are solved."""
        return sum(dots.count("●") for _, dots in self.rows)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(len(dots) for _, dots in self.rows)

    def __repr__(self) -> str:
        width = max(len(title) for title, _ in self.rows)
        lines = [f"{title:{width}}  {dots}" for title, dots in self.rows]
        return "\n".join([*lines, f"{self.solved} of {self.total} solved"])

    def _repr_markdown_(self) -> str:
        rows = [f"| {title} | {dots} |" for title, dots in self.rows]
        head = [f"| {self.solved} of {self.total} solved | |", "|---|---|"]
        return "\n".join([*head, *rows])
