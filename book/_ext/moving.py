"""Figures that move: an admonition of class `moving` becomes one on a web page.

Its other class names the figure. `annotated_src.figures.moving` has the numbers, which
go into the page, and `_static/moving` the script that draws them. The admonition's text
stays: it says the same in words, and is all that other forms of the book show.
"""

import json
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


class MovingNode(nodes.General, nodes.Element):
    """A figure of this `name`; its children are the caption and the text."""


def open_figure(writer: HTML5Translator, node: MovingNode) -> None:
    """Write the figure as far as its caption's words."""
    writer.body.append(writer.starttag(node, "figure"))


def close_figure(writer: HTML5Translator, node: MovingNode) -> None:
    writer.body.append("</figure>\n")


def is_web_page(app: Sphinx) -> bool:
    """Say whether the pages are for a browser, which runs scripts."""
    return app.builder.format == "html" and app.builder.name != "epub"


def as_element(name: str, data: dict[str, Any]) -> nodes.raw:
    """Return the element that a script fills, with its numbers inside."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c")  # so that nothing in it ends the script
    script = f'<script type="application/json">{text}</script>'
    html = f"<moving-{name}>{script}</moving-{name}>\n"
    return nodes.raw("", html, format="html")


def find_name(node: nodes.admonition) -> str | None:
    """Return the name of the figure that the admonition asks for, if there is one."""
    from annotated_src.figures.moving import FIGURES  # slow, and not for every page

    names = [name for name in node["classes"] if name in FIGURES]
    if len(names) == 1:
        return names[0]
    known = ", ".join(sorted(FIGURES))
    logger.warning(
        "a moving figure needs one name among its classes %s; there are: %s",
        node["classes"],
        known,
        location=node,
        type="moving",
    )
    return None


def make_figures(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Turn a page's admonitions of class `moving` into figures."""
    if not is_web_page(app):
        return
    for node in list(tree.findall(nodes.admonition)):
        if "moving" not in node["classes"] or not (name := find_name(node)):
            continue
        from annotated_src.figures.moving import FIGURES

        title, *text = node.children
        caption = nodes.raw("", "<figcaption>", format="html")
        end = nodes.raw("", "</figcaption>\n", format="html")
        figure = MovingNode("", caption, *title.children, end, name=name)
        figure += [as_element(name, FIGURES[name]()), *text]
        figure["ids"] = [f"moving-{name}"]
        node.replace_self(figure)


def load_files(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    tree: nodes.document | None,
) -> None:
    """Load script and style on pages with such a figure, and on no others."""
    names = {node["name"] for node in tree.findall(MovingNode)} if tree else set()
    if names:
        app.add_css_file("moving/moving.css")
    for name in ["moving", *sorted(names)] if names else []:
        app.add_js_file(f"moving/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the figures."""
    app.add_node(MovingNode, html=(open_figure, close_figure))
    app.connect("doctree-resolved", make_figures)
    app.connect("html-page-context", load_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
