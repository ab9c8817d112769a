"""The list of chapters beside every page.

The theme makes its list anew for each page from the whole tree of the book, which takes
longer than all the rest of a page; this one is read from the tree once.
"""

from functools import cache
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.addnodes import toctree
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import clean_astext


class Entry(NamedTuple):
    """A line of the list: its page, and its words with the chapter's number."""

    page: str
    words: str


@cache
def parts(env: BuildEnvironment) -> list[tuple[str, list[Entry]]]:
    """List the parts of the book: caption and entries."""
    return [
        (part["caption"] or "", [entry(env, *line) for line in part["entries"]])
        for part in env.tocs[env.config.root_doc].findall(toctree)
    ]


def entry(env: BuildEnvironment, words: str | None, page: str) -> Entry:
    """Name a page as the tree does, or as its title and number do."""
    if words:
        return Entry(page, words)
    number = env.toc_secnumbers.get(page, {}).get("", ())
    title = clean_astext(env.titles[page])
    return Entry(page, f"{'.'.join(map(str, number))}. {title}" if number else title)


def belongs(page: str, to: str) -> bool:
    """Say whether a page is an entry's, or stands in the folder whose index it is."""
    return page == to or (to.endswith("/index") and page.startswith(to[:-5]))


def add_contents(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Give the template the parts, and a way to tell where the reader is."""
    context["book_parts"] = parts(app.env)
    context["belongs"] = belongs


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the list."""
    app.connect("html-page-context", add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
