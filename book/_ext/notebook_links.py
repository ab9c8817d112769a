"""Links from one notebook to another, though Sphinx sees them through a link."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

NOTEBOOKS = (Path(__file__).resolve().parents[2] / "notebooks").as_posix()


def find_pages(app: Sphinx, tree: nodes.document) -> None:
    """Name the pages below `notebooks`, which MyST looks for outside of the book."""
    for node in tree.findall(pending_xref):
        target: Any = node.get("reftarget") or ""
        if node.get("reftype") == "myst" and target.startswith(f"{NOTEBOOKS}/"):
            node["reftarget"] = "notebooks" + target.removeprefix(NOTEBOOKS)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the repair."""
    app.connect("doctree-read", find_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
