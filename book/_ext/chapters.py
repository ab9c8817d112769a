"""What the chapters say of themselves, read from their scripts."""

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

BOOK = Path(__file__).resolve().parents[1]
CELL = re.compile(r"^# %%(.*)$", re.M)
BOX = re.compile(
    r"^:::\{admonition\} (?P<title>[^\n]+)\n"
    r":class: (?P<kind>[\w-]+)\n(?P<body>.*?)^:::$",
    re.M | re.S,
)


class Chapter(NamedTuple):
    """A chapter, by its script."""

    number: int  # as it is counted through all parts
    page: str  # Sphinx's name of it
    source: str

    @property
    def script(self) -> Path:
        """Where it is read from."""
        return BOOK.parent / f"{self.page}.py"

    @property
    def label(self) -> str:
        """What `{ref}` finds it by, without `ch-`."""
        return self._find(r"^# \(ch-([\w-]+)\)=$")

    @property
    def title(self) -> str:
        """Its heading."""
        return self._find(r"^# # (.+)$")

    @property
    def minutes(self) -> int:
        """How long it takes, by its card."""
        return int(self._find(r"\*\*(\d+) minutes"))

    @property
    def text(self) -> str:
        """Its prose, as Markdown."""
        _, *cells = CELL.split(self.source)
        heads, bodies = cells[::2], cells[1::2]
        prose = (
            body
            for head, body in zip(heads, bodies, strict=True)
            if "[markdown]" in head
        )
        return re.sub(r"^# ?", "", "".join(prose), flags=re.M)

    @property
    def lesson(self) -> str:
        """Its prose before the exercises."""
        return self.text.partition("\n## Exercises")[0]

    @property
    def calls(self) -> list[ast.Call]:
        """Every call in it of a function or class by its bare name."""
        found = (n for n in ast.walk(ast.parse(self.source)) if isinstance(n, ast.Call))
        return [call for call in found if isinstance(call.func, ast.Name)]

    def boxes(self, kind: str) -> list[tuple[str, str]]:
        """Title and body of its boxes of one kind."""
        found = BOX.finditer(self.text)
        return [(box["title"], box["body"]) for box in found if box["kind"] == kind]

    def _find(self, pattern: str) -> str:
        if not (found := re.search(pattern, self.source, re.M)):
            raise ValueError(f"{self.page} has nothing like {pattern}")
        return found[1]


@cache
def parts() -> dict[str, list[Chapter]]:
    """Read the chapters, part by part, in the order of the first page."""
    index = (BOOK / "index.md").read_text("utf-8")
    found: dict[str, list[Chapter]] = {}
    number = 0
    for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.M | re.S):
        caption = re.search(r"^:caption: (.+)$", tree, re.M)
        for page in re.findall(r"^notebooks/\S+$", tree, re.M):
            number += 1
            source = (BOOK.parent / f"{page}.py").read_text("utf-8")
            part = found.setdefault(caption[1] if caption else "", [])
            part.append(Chapter(number, page, source))
    return found


def chapters() -> list[Chapter]:
    """Read all chapters, in order."""
    return list(chain.from_iterable(parts().values()))


def leans_on(chapter: Chapter) -> list[Chapter]:
    """Find the earlier chapters that its lesson sends you back to."""
    named = set(re.findall(r"\{ref\}`ch-([\w-]+)`", chapter.lesson))
    earlier = chapters()[: chapter.number - 1]
    return [other for other in earlier if other.label in named]


def claims(source: str) -> list[str]:
    """List what code confirms, in order; of a text with gaps, what is around them."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "confirm":
            claim = call.args[0]
            pieces = claim.values if isinstance(claim, ast.JoinedStr) else [claim]
            said = [str(p.value) for p in pieces if isinstance(p, ast.Constant)]
            found.append((call.lineno, " ".join("".join(said).split())))
    return [claim for _, claim in sorted(found) if claim]
