"""A page for every module: its notes on the left, its code on the right.

Chapters link to the lines, and the lines back to the chapters. The pages are written
before Sphinx reads; nothing on them is said twice.
"""

import re
import textwrap
from typing import Any

from docutils import nodes
from package_files import ROOT, dotted
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from segments import Segment, segments
from shown import places
from source_links import link
from source_pages import write_pages
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTIONS = re.compile(
    r"^(Raises|Returns|Yields|Args|Attributes|Example|Notes?):$", re.M
)


class AnnotatedSource(SphinxDirective):
    """Show a module, given by its file, note by note."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / self.arguments[0]
        self.env.note_dependency(str(path))
        source = path.read_text("utf-8")
        html = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
        self.lines, self.module = html.split("\n"), dotted(path)
        found: list[nodes.Node] = []
        into: Any = found
        for segment in segments(source):
            top = segment.kind in ("function", "class")
            if top or (segment.name == "" and not _indented(segment)):
                into = found
            if top:
                into = self.section(segment)
                found.append(into)
            into.append(self.row(segment))
        return found

    def section(self, segment: Segment) -> nodes.section:
        section = nodes.section(ids=[f"{self.module}.{segment.name}"])
        section += nodes.title("", "", nodes.literal(text=segment.name))
        self.state.document.note_implicit_target(section, section)
        return section

    def row(self, segment: Segment) -> nodes.container:
        note = nodes.container(classes=["source-note"])
        if segment.kind == "method":
            note["ids"].append(f"{self.module}.{segment.name}")
            short = segment.name.partition(".")[2]
            note += nodes.paragraph("", "", nodes.literal(text=short))
        note += self.parse_text_to_nodes(_as_rst(segment))
        if segment.name and (links := self.back_links(segment.name)):
            note += links
        code = nodes.raw("", self.code(segment), format="html")
        return nodes.container("", note, code, classes=["source-row"])

    def code(self, segment: Segment) -> str:
        lines = "".join(
            f'<span class="source-line" id="L{number}"><a class="source-number" '
            f'href="#L{number}" tabindex="-1" aria-hidden="true">{number}</a>'
            f"{self.lines[number - 1]}\n</span>"
            for number, _ in segment.code
        )
        return lines and (
            f'<div class="source-code highlight notranslate"><pre>{lines}</pre></div>'
        )

    def back_links(self, name: str) -> nodes.Node | None:
        found = places().get(f"{self.module}.{name}", [])
        line = nodes.paragraph("", "Shown in ", classes=["source-back"])
        for i, place in enumerate(found):
            line += nodes.Text("; " if i else "")
            line += link(place.words, place.page, place.anchor)
        return line if found else None


def _indented(segment: Segment) -> bool:
    return any(line.startswith(" ") for _, line in segment.code[:1])


def _as_rst(segment: Segment) -> str:
    """Write a docstring's sections as lists, and a comment as a paragraph."""
    parts = []
    if segment.comment:
        parts.append(re.sub(r"([*_|\\])", r"\\\1", " ".join(segment.comment)))
    text, last = segment.docstring, 0
    for match in SECTIONS.finditer(text):
        parts.append(text[last : match.start()])
        body, last = _block(text, match.end())
        items = re.sub(
            r"^(\S[^:\n]*):\s+", r"\1\n    ", textwrap.dedent(body), flags=re.M
        )
        parts.append(f"**{match[1]}**\n\n{items}")
    return "\n\n".join([*parts, text[last:]])


def _block(text: str, start: int) -> tuple[str, int]:
    """Take the indented lines that follow."""
    match = re.compile(r"\n(?:[ \t]+\S.*\n?|[ \t]*\n)*").match(text, start)
    return (match[0], match.end()) if match else ("", start)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages and the directive."""
    app.add_directive("annotated-source", AnnotatedSource)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
