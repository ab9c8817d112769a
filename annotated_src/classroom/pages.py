"""Pages of feedback that run nothing, and ask nothing of the network."""

from __future__ import annotations

import re
from typing import Any

from nbconvert.exporters import HTMLExporter
from nbformat import NotebookNode

SCRIPT = re.compile(r"<script\b.*?</script>", re.S | re.I)
# What a student wrote is in the page, too: so a browser is told what it may do.
HEAD = """<head>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>summary {display: list-item; cursor: pointer}</style>"""


class OfflineHTML(HTMLExporter):
    """nbconvert's pages without scripts: those of the page, and those of students.

    Formulas stay as they were typed: MathJax, from the network, would draw them.
    """

    def from_notebook_node(
        self, nb: NotebookNode, resources: dict[str, Any] | None = None, **kw: Any
    ) -> tuple[str, dict[str, Any]]:
        """Write a page."""
        page, resources = super().from_notebook_node(nb, resources, **kw)
        return SCRIPT.sub("", page).replace("<head>", HEAD, 1), resources
