"""A directive that draws a map on which every box leads to its chapter.

Which chapter lights what is read from the chapters, which each begin with a map.
"""

import ast
from functools import cache
from html import escape
from typing import Any
from xml.etree import ElementTree

from chapters import Chapter, chapters
from docutils import nodes
from linked_map import draw, words_of
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from annotated_src.figures.device_map import DeviceMap
from annotated_src.figures.model_map import ChatGLMMap, ModelMap
from annotated_src.figures.station_map import StationMap

MAPS = {map.__name__: map for map in (ModelMap, ChatGLMMap, StationMap, DeviceMap)}


@cache
def lights(chapter: Chapter) -> tuple[str, set[str]]:
    """Name the map that a chapter begins with, and the parts that it lights there."""
    for call in chapter.calls:
        if isinstance(call.func, ast.Name) and call.func.id in MAPS:
            name = call.func.id
            given = [part.value for part in call.args if isinstance(part, ast.Constant)]
            return name, MAPS[name](*map(str, given)).lit
    raise ValueError(f"{chapter.page} begins with no map")


@cache
def lit_on(name: str) -> dict[Chapter, set[str]]:
    """Find the chapters that light parts of a map, in order."""
    found = {chapter: lights(chapter) for chapter in chapters()}
    return {chapter: parts for chapter, (on, parts) in found.items() if on == name}


def table(name: str) -> str:
    """Say in words what the map shows, as a Markdown table."""
    rows = ["| no. | chapter | lights |", "|--:|---|---|"]
    words = words_of(MAPS[name])
    for chapter, parts in lit_on(name).items():
        lit = "; ".join(words[part] for part in words if part in parts)
        if parts >= set(words):
            lit = "everything"
        rows.append(f"| {chapter.number} | {{ref}}`ch-{chapter.label}` | {lit} |")
    return "\n".join(rows)


class book_map(nodes.General, nodes.Element):  # noqa: N801, docutils' custom
    """Where a map is drawn, once it is known from which page one looks."""


class LinkedMap(SphinxDirective):
    """Show a map; its argument is the name of a class in MAPS."""

    required_arguments = 1
    option_spec = {"title": lambda text: text}

    def run(self) -> list[nodes.Node]:
        """Leave a place for the drawing, and write the table."""
        (name,) = self.arguments
        for chapter in lit_on(name):
            self.env.note_dependency(str(chapter.script))
        closed = f"```{{dropdown}} The same in words\n{table(name)}\n```"
        place = book_map(name=name, title=self.options["title"])
        return [place, *self.parse_text_to_nodes(closed)]


def visit_map(self: Any, node: book_map) -> None:
    """Write the chapters and the drawing."""
    here, lit = self.builder.current_docname, lit_on(node["name"])

    def address(chapter: Chapter) -> str:
        return self.builder.get_relative_uri(here, chapter.page)

    names = "\n".join(
        f'<li><a href="{address(chapter)}" data-parts="{" ".join(sorted(parts))}">'
        f"{chapter.number} {escape(chapter.title)}</a></li>"
        for chapter, parts in lit.items()
    )
    svg = draw(MAPS[node["name"]], node["title"], lit, address)
    drawn = ElementTree.tostring(svg, "unicode")
    title = escape(node["title"])
    self.body.append(
        f'<div class="book-map book-map-{node["name"].lower()}">'
        f'<ul aria-label="Chapters on the map of {title}">{names}</ul>{drawn}</div>\n'
    )
    raise nodes.SkipNode


def skip(self: Any, node: book_map) -> None:
    """Leave it to the table, where nothing can be drawn."""
    raise nodes.SkipNode


def add_files(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Bring style and script to a page with a map; on paper nothing moves."""
    if tree is not None and next(tree.findall(book_map), None):
        app.add_css_file("model_map.css")
        if not app.tags.has("print"):
            app.add_js_file("model_map.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_node(book_map, html=(visit_map, None), latex=(skip, None))
    app.add_directive("linked-map", LinkedMap)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
