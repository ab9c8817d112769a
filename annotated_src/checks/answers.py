"""What an exercise says back, for Jupyter (Markdown) and for the terminal."""

from __future__ import annotations

import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@dataclass(frozen=True)
class Link:
    """A section of a chapter: `chapter` is "llama/04_rope"."""

    chapter: str
    section: str

    def __str__(self) -> str:
        return f"“{self.section}” in notebooks/{self.chapter}.ipynb"

    def markdown(self) -> str:
        """Link to the heading, from the folder in which the notebook runs."""
        place = Path(os.path.relpath(NOTEBOOKS / f"{self.chapter}.ipynb")).as_posix()
        anchor = re.sub(r"[^\w\- ]", "", self.section.lower()).replace(" ", "-")
        return f"[{self.section}]({place}#{anchor})"


@dataclass(frozen=True)
class Part:
    """A piece of an answer: a sentence, or a label with a value below it."""

    text: str
    code: str = ""
    link: Link | None = None

    def markdown(self) -> str:
        """Write it as Markdown."""
        text = self.text + (f" {self.link.markdown()}" if self.link else "")
        return f"{text}\n\n```text\n{self.code}\n```" if self.code else text

    def __str__(self) -> str:
        # stars of emphasis go; those inside code are products and powers
        pieces = enumerate(self.text.split("`"))
        stars = r"(\*{1,2})(?=\S)(.+?)(?<=\S)\1"
        text = "".join(x if i % 2 else re.sub(stars, r"\2", x) for i, x in pieces)
        text += f" {self.link}" if self.link else ""
        lines = textwrap.fill(text, 80)
        return f"{lines}\n{textwrap.indent(self.code, '    ')}" if self.code else lines


@dataclass(frozen=True)
class Answer:
    """What `check` found. It is true when the attempt is right.

    `kind` is "right", or what is wrong: "signature", "unfinished", "raised",
    "timed out", "random", "changed", "type", "shape", "length", "keys", "dtype",
    "values", "choice".
    `mistake` names the misconception that does exactly this, if one is known.
    """

    exercise: str
    kind: str
    parts: tuple[Part, ...]
    mistake: str = ""

    def __bool__(self) -> bool:
        return self.kind == "right"

    @property
    def headline(self) -> str:
        """The first line: which exercise, and whether it is solved."""
        return f"{'✓' if self else '✗'} {self.exercise}: {'' if self else 'not '}solved"

    def __repr__(self) -> str:
        return "\n\n".join([self.headline, *map(str, self.parts)])

    def _repr_markdown_(self) -> str:
        return "\n\n".join(
            [f"**{self.headline}**", *(p.markdown() for p in self.parts)]
        )
