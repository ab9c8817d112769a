"""The files that Sphinx reads for the annotated source: one for each module."""

from pathlib import Path

from package_files import PACKAGE, ROOT, map_of_package, page
from sphinx.application import Sphinx

PAGE = """:html_theme.sidebar_secondary.remove: true
{search}

{name}
{line}

.. annotated-source:: {file}
"""
# Nobody looks for a word of theirs, and they would be half of the search's index.
UNSEARCHED = ("checks", "classroom", "exercises", "figures")
INDEX = """Annotated source
================

Every module of the package, in the order in which to read them: each imports only
from those above it. A page has the notes of a module beside the code that they are
about, both from the file that the tests test. :doc:`/notation` explains the letters of
the shapes.

{entries}

.. toctree::
   :hidden:

{pages}
"""


def write_pages(app: Sphinx) -> None:
    """Write the sources of the pages; one that is as it was is left alone."""
    folder = Path(app.srcdir) / "source"
    wanted = {folder / "index.rst": _index()}
    for path in (file for _, _, files in map_of_package() for file in files):
        name = path.relative_to(PACKAGE).as_posix()
        file = path.relative_to(ROOT).as_posix()
        search = ":nosearch:" if name.startswith(UNSEARCHED) else ""
        text = PAGE.format(search=search, name=name, line="=" * len(name), file=file)
        wanted[Path(app.srcdir) / f"{page(path)}.rst"] = text
    for old in set(folder.rglob("*.rst")) - wanted.keys():
        old.unlink()
    for target, text in wanted.items():
        if not target.exists() or target.read_text("utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")


def _index() -> str:
    """Write the map of the package as a list of links."""
    entries, pages = [], []
    for name, words, files in map_of_package():
        first, *rest = (f"/{page(file)}" for file in files)
        pages += [first, *rest]
        entries.append(f"- :doc:`{name} <{first}>`: {words}")
        if rest:
            inner = (f":doc:`{p.removeprefix(f'/source/{name}/')} <{p}>`" for p in rest)
            entries.append(f"\n  {', '.join(inner)}\n")
    tree = "\n".join(f"   {page}" for page in pages)
    return INDEX.format(entries="\n".join(entries), pages=tree)
