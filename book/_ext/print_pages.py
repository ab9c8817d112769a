"""What the book on paper and the book for e-readers need besides the web's pages.

Both are built with the tag `print`: `conf.py` then adds this extension.
"""

import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.epub3 import Epub3Builder
from sphinx.util import logging
from sphinxcontrib import katex

logger = logging.getLogger(__name__)
PARTS = {"mathml": "<math", "svg": "<svg"}  # what an EPUB's list of files must tell
SHEETS = {"epub_book.css", "pygments.css"}

# What HTML and browsers forgive, and an EPUB does not.
VOID = re.compile(r"<(br|hr|img|col|wbr|input)\b([^>]*?)\s*/?>")
FOLDED = re.compile(r"<summary[^>]*>\s*<p class=\"collapsed.*?</summary>", re.DOTALL)
ARROW = re.compile(r'<span class="sd-summary-state-marker.*?</svg></span>', re.DOTALL)


class BookBuilder(Epub3Builder):
    """Build an EPUB that says which of its pages hold formulas and drawings."""

    def build_content(self) -> None:
        """Write the list of files, and add to it what Sphinx leaves out."""
        used = SHEETS | {self.cover_name()}
        self.config.epub_exclude_files = [
            path.relative_to(self.outdir).as_posix()
            for path in (self.outdir / "_static").rglob("*")
            if path.is_file() and path.name not in used
        ]
        super().build_content()
        path = self.outdir / "content.opf"
        lines = path.read_text("utf-8").splitlines(keepends=True)
        # The index is in the list of contents, and Sphinx adds it once more.
        lines = [
            x for i, x in enumerate(lines) if "<itemref" not in x or x not in lines[:i]
        ]
        path.write_text("".join(map(self.mark_item, lines)), "utf-8")

    def cover_name(self) -> str:
        return self.config.epub_cover[0].rpartition("/")[2]

    def mark_item(self, line: str) -> str:
        """Add to a line of the list of files what it says of the file's content."""
        found = re.search(r'<item id="[^"]+" href="([^"]+)"', line)
        if not found:
            return line
        marks = []
        if found[1].endswith(".xhtml") and "properties=" not in line:
            page = (self.outdir / found[1]).read_text("utf-8")
            marks = [name for name, start in PARTS.items() if start in page]
        elif found[1] == self.config.epub_cover[0]:
            marks = ["cover-image"]
        return line.replace(" />", f' properties="{" ".join(marks)}" />', bool(marks))


def choose_math(app: Sphinx) -> None:
    """Leave MathML alone in an EPUB: e-readers draw it, and have not KaTeX's fonts."""
    if app.builder.name == "epub":
        options: dict[str, Any] = katex.KATEX_DEFAULT_OPTIONS
        options["output"] = "mathml"


def make_xhtml(page: str, body: str) -> str:
    """Close what HTML leaves open, open what is folded; say where it does not do."""
    body = VOID.sub(r"<\1\2 />", body).replace("&nbsp;", "&#160;")
    body = ARROW.sub("", FOLDED.sub("<summary>Code</summary>", body))
    body = body.replace("<details", '<details open="open"')
    try:
        ElementTree.fromstring(f"<body>{body}</body>")
    except ElementTree.ParseError as error:
        logger.warning("not well-formed: %s", error, location=page, type="print")
    return body


def choose_page(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    tree: nodes.document | None,
) -> str | None:
    """Give the single page its own frame, and an EPUB's pages valid contents."""
    if app.builder.name == "singlehtml":
        context["author"] = app.config.author
        return "print.html"
    if app.builder.name == "epub":
        context["body"] = make_xhtml(page, context.get("body", ""))
        context["script_files"] = []
        context["css_files"] = [
            sheet
            for sheet in context["css_files"]
            if str(sheet.filename).rpartition("/")[2] in SHEETS
        ]
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the builder and what changes the pages."""
    app.setup_extension("sphinx.builders.epub3")
    app.add_builder(BookBuilder, override=True)
    app.connect("builder-inited", choose_math)
    app.connect("html-page-context", choose_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
