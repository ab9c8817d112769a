"""A directive that collects the boxes of one kind from all chapters."""

import re

from chapters import Chapter, chapters
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LABEL = re.compile(r"^\$\$ \([\w-]+\)$", re.M)  # an equation has one home


def collect(chapter: Chapter, kind: str) -> str:
    """Write a chapter's boxes once more, each with a link to its place."""
    written = []
    for number, (title, body) in enumerate(chapter.boxes(kind), 1):
        place = f"box-{chapter.label}-{number}"
        back = f"{{ref}}`See it shown in chapter {chapter.number} <{place}>`"
        fence = f":::{{admonition}} {title}\n:class: {kind}"
        written.append(f"{fence}\n{LABEL.sub('$$', body)}\n{back}\n:::\n")
    return "\n".join(written)


class CollectedBoxes(SphinxDirective):
    """Show every box of a kind, by chapter."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse each chapter's boxes into a section of this page."""
        (kind,) = self.arguments
        sections: list[nodes.Node] = []
        for chapter in chapters():
            self.env.note_dependency(str(chapter.script))
            if text := collect(chapter, kind):
                title = f"{chapter.number}. {chapter.title}"
                section = nodes.section("", nodes.title(title, title))
                section["ids"] = [f"boxes-{chapter.label}"]
                lines = StringList(text.splitlines(), str(chapter.script))
                self.state.nested_parse(lines, 0, section)
                sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("collected-boxes", CollectedBoxes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
