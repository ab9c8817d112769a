"""Each chapter says where its notebook is: to download, and in a running JupyterLab."""

from docutils import nodes
from sphinx.application import Sphinx

LAB = "http://localhost:8888/lab/tree/"  # where `make lab` serves the notebooks
CHAPTERS = "notebooks/"
LINE = (
    '<p class="run-it">Run it: <a href="{file}" download>download this notebook</a>, '
    'or <a href="{lab}">open it in JupyterLab</a> '
    "(while <code>make lab</code> runs).</p>"
)


def offer_notebook(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Put the line below the chapter's card."""
    if app.builder.name != "html" or not page.startswith(CHAPTERS):
        return
    card = next(
        node
        for node in tree.findall(nodes.Admonition)
        if "at-a-glance" in node.get("classes", ())
    )
    up = "../" * page.count("/")
    html = LINE.format(
        file=f"{up}_sources/{page}.ipynb",
        lab=f"{LAB}{page.removeprefix(CHAPTERS)}.ipynb",
    )
    card.parent.insert(card.parent.index(card) + 1, nodes.raw("", html, format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the line."""
    app.connect("doctree-resolved", offer_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
