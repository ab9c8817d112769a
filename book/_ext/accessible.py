"""Small repairs of what the theme and the extensions write, for screen readers."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def mend_page(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Give bibliography entries a role that may stand outside a bibliography list."""
    if body := context.get("body"):
        context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the repairs."""
    app.connect("html-page-context", mend_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
