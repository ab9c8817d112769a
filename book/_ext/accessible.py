"""Small repairs of what the theme and the extensions write, for screen readers."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

EMPTY_HEAD = re.compile(r"<th([^>]*)>\s*(?:<p>\s*</p>)?\s*</th>")
WORD = re.compile(r"(<mo[^>]*>)<mrow>((?:<mi[^>]*>\w</mi>)+)</mrow>(?=</mo>)")
TAG = re.compile(r"<[^>]+>")


def mend_formulas(body: str) -> str:
    """Mend KaTeX's MathML: a third child in `msub`, and a word that is many `mi`."""
    body = body.replace("<mo>\u2061</mo>", "")  # what applies a function has no ink
    return WORD.sub(lambda found: found[1] + TAG.sub("", found[2]), body)


def mend_tables(body: str) -> str:
    """Let every head of a column say something: an empty corner heads nothing."""
    return EMPTY_HEAD.sub(r"<td\1></td>", body)


def mend_page(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Mend formulas, tables, and a role that may stand in a bibliography list only."""
    if body := context.get("body"):
        body = body.replace('role="doc-biblioentry"', 'role="listitem"')
        context["body"] = mend_tables(mend_formulas(body))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the repairs."""
    app.connect("html-page-context", mend_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
