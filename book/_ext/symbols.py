"""A page for every symbol of the sources: where the book derives, shows and tests it.

Each file `symbols/*.toml` describes one project, its files, and their symbols in the
order of the source. What can be read off the book is computed: which cell shows our
code, which original tensors it is compared with, where an exercise stands. The pages
are written into `symbols/`, beside their data, whenever they would change.
"""

import html
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from symbols_data import Project, page_name, read_projects
from symbols_page import write_body, write_head
from symbols_scan import scan_book

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "book" / "symbols"

NAMES: dict[str, str] = {}
INDEX = """(symbols)=
# Source symbols

You have somebody's source open, and a name on your lips. Here is a page for it: what
it does *there*, what one should know about it, where this book derives it, shows ours,
and tests one against the other. The names are in the order of the files; the search
and the {{ref}}`genindex` know them too.

{sections}
"""


def write_pages(app: Sphinx) -> None:
    """Write the index and all pages; touch only what changes, delete what is gone."""
    projects, book = read_projects(FOLDER), scan_book(ROOT)
    NAMES.update(name_pages(projects))
    pages = {"index.md": write_index(projects)}
    for project in projects:
        for symbol in project.symbols:
            pages[f"{page_name(project.slug, symbol.name)}.md"] = "\n".join(
                [*write_head(project, symbol), *write_body(project, symbol, book)]
            )
    for old in FOLDER.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = FOLDER / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8", newline="\n")


def name_pages(projects: list[Project]) -> dict[str, str]:
    """Map each page, in the order of the sources, to the symbol that it is about."""
    return {
        f"symbols/{page_name(project.slug, symbol.name)}": symbol.name
        for project in projects
        for symbol in project.symbols
    }


def link_neighbours(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Lead from each symbol to those before and behind it in the source."""
    if page not in NAMES:
        return
    order = ["symbols/index", *NAMES, "symbols/index"]
    at = order.index(page, 1)
    for key, other in (("prev", order[at - 1]), ("next", order[at + 1])):
        title = html.escape(NAMES.get(other, "Source symbols"))
        link = app.builder.get_relative_uri(page, other)
        context[key] = {"link": link, "title": title}


def write_index(projects: list[Project]) -> str:
    """List all symbols by project and file, each with the first sentence about it."""
    sections = []
    for project in projects:
        sections += [f"## {project.title}", "", project.about]
        path = None
        for symbol in project.symbols:
            page = page_name(project.slug, symbol.name)
            if symbol.path != path:
                path = symbol.path
                sections += ["", f"### `{path}`", ""]
            sections.append(f"- [`{symbol.name}`]({page}.md): {brief(symbol.does)}")
        sections.append("")
    return INDEX.format(sections="\n".join(sections).strip())


def brief(text: str) -> str:
    """Return the first sentence."""
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()), maxsplit=1)[0]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages; they must be there before Sphinx looks for pages."""
    app.connect("builder-inited", write_pages)
    app.connect("html-page-context", link_neighbours)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
