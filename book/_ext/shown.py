"""Which chapter shows the source of what: read from the chapters' own cells."""

import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from docutils import nodes
from package_files import ROOT, resolve
from symbols_scan import scan_book


class Place(NamedTuple):
    """A section of a chapter."""

    page: str  # notebooks/llama/04_rope
    words: str  # the titles of the chapter and of the section
    anchor: str


@cache
def places() -> dict[str, list[Place]]:
    """Map each dotted name that a chapter passes to `show` to where it does so."""
    found: dict[str, list[Place]] = defaultdict(list)
    for shown, chapter, heading in scan_book(ROOT).shown:
        titles = [next(iter(chapter.slugs)), *filter(None, [heading])]
        words = re.sub(r"[`*]", "", ": ".join(titles))
        place = Place(chapter.page, words, nodes.make_id(heading))
        if (name := resolve(shown)) and place not in found[name]:
            found[name].append(place)
    return dict(found)
