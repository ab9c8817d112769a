"""Keep the entries of the index in the search when only some pages are built again.

Sphinx reads the old search index then, but not the entries in it (8.2: `IndexBuilder.
load`), so that after a second build no term of the glossary was found by its name.
"""

from collections.abc import Iterable
from typing import Any

from sphinx.application import Sphinx
from sphinx.search import IndexBuilder, js_index

load, prune = IndexBuilder.load, IndexBuilder.prune


def load_all(self: IndexBuilder, stream: Any, format: Any) -> None:
    """Load what Sphinx does, then the entries: word to page, place, whether main."""
    load(self, stream, format)
    stream.seek(0)
    frozen = js_index.load(stream)
    for word, places in frozen["indexentries"].items():
        for number, anchor, main in places:
            entries = self._index_entries.setdefault(frozen["docnames"][number], [])
            entries.append((word, anchor, "main" if main else ""))


def prune_all(self: IndexBuilder, docnames: Iterable[str]) -> None:
    """Forget the entries of pages that are gone, or that will be read again."""
    kept = set(docnames)
    prune(self, kept)
    for page in self._index_entries.keys() - kept:
        del self._index_entries[page]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register it, where the index is the one that pages load."""
    IndexBuilder.load, IndexBuilder.prune = load_all, prune_all
    return {"parallel_read_safe": True, "parallel_write_safe": True}
