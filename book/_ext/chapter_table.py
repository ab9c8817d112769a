"""A directive that lists the chapters: how long, and what each leans on."""

from chapters import Chapter, leans_on, parts
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def hours(minutes: int) -> str:
    """Say minutes in the words of a clock."""
    return f"{minutes // 60} h {minutes % 60:02} min"


def table(part: str, chapters: list[Chapter]) -> str:
    """Write a part's chapters as a Markdown table, with the sum in the last row."""
    rows = [f"| no. | {part} | minutes | leans on |", "|--:|---|--:|---|"]
    for chapter in chapters:
        earlier = ", ".join(
            f"{{ref}}`{other.number} <ch-{other.label}>`" for other in leans_on(chapter)
        )
        link = f"{{ref}}`ch-{chapter.label}`"
        minutes = chapter.minutes
        rows.append(f"| {chapter.number} | {link} | {minutes} | {earlier or '–'} |")
    total = sum(chapter.minutes for chapter in chapters)
    return "\n".join([*rows, f"| | *together* | {total} | |", ""])


class ChapterTable(SphinxDirective):
    """Show a table for each part."""

    def run(self) -> list[nodes.Node]:
        """Parse the tables in place."""
        holder = nodes.container(classes=["chapter-table"])
        for part, chapters in parts().items():
            for chapter in chapters:
                self.env.note_dependency(str(chapter.script))
            lines = StringList(table(part, chapters).splitlines(), __file__)
            self.state.nested_parse(lines, 0, holder)
        return [holder]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("chapter-table", ChapterTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
