"""Turn the boxes of a map from `annotated_src.figures` into links."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from chapters import Chapter

from annotated_src.figures.model_map import BOX_WIDTH, LEFT, ModelMap

SVG = "http://www.w3.org/2000/svg"
TEXT = 16.0  # px, as large as the page's own
MARGIN = 70.0  # left of the boxes, with the sign of the repeated block
RESIDUAL = "residual"  # has lines, not boxes

ElementTree.register_namespace("", SVG)


def boxes_of(map_class: Any) -> list[tuple[str, str]]:
    """List the boxes of a map as they are drawn: part, and words."""
    if issubclass(map_class, ModelMap):
        return [box for row in map_class.rows for box in row.boxes]
    return [(part, station.words) for part, station in map_class.stations.items()]


def words_of(map_class: Any) -> dict[str, str]:
    """Say what is written in the boxes of each part."""
    words: dict[str, list[str]] = {}
    for part, text in boxes_of(map_class):
        words.setdefault(part, []).append(text)
    said = {part: ", ".join(dict.fromkeys(texts)) for part, texts in words.items()}
    if RESIDUAL in getattr(map_class, "extra_parts", ()):
        said[RESIDUAL] = "the residual lines"
    return said


def home(part: str, lit: Mapping[Chapter, set[str]]) -> Chapter:
    """Choose the chapter that a box leads to: the one that lights least beside it."""
    return min((c for c in lit if part in lit[c]), key=lambda c: len(lit[c]))


def draw(
    map_class: Any,
    title: str,
    lit: Mapping[Chapter, set[str]],
    address: Callable[[Chapter], str],
) -> Element:
    """Draw a map whose boxes are links; what a link names, its label says, too."""
    svg = ElementTree.fromstring(map_class()._repr_html_())
    name = svg.find(f"{{{SVG}}}title")
    if name is not None:
        svg.remove(name)
    svg.set("role", "group")
    svg.set("aria-label", f"Map of {title}. Each box leads to a chapter.")
    svg.set("class", "model-map")
    if issubclass(map_class, ModelMap):
        _narrow(svg, map_class)
    _enlarge(svg)
    _link(svg, boxes_of(map_class), lit, address)
    return svg


def _narrow(svg: Element, map_class: type[ModelMap]) -> None:
    """Leave the shapes to the chapters: two maps must fit side by side."""
    shapes = {row.shape for row in map_class.rows}
    for text in svg.findall(f"{{{SVG}}}text"):
        if text.text in shapes:
            svg.remove(text)
    for line in svg.findall(f"{{{SVG}}}path[@stroke-width]"):
        line.set("data-parts", RESIDUAL)
    height = svg.get("viewBox", "").split()[3]
    width = MARGIN + BOX_WIDTH + 14
    svg.set("viewBox", f"{LEFT - MARGIN:g} 0 {width:g} {height}")


def _enlarge(svg: Element) -> None:
    """Choose the width at which the smallest words are as large as the text."""
    sizes = [float(t.get("font-size", TEXT)) for t in svg.iter(f"{{{SVG}}}text")]
    width = float(svg.get("viewBox", "").split()[2]) * TEXT / min(sizes)
    svg.set("width", f"{width:.0f}")
    svg.set("style", "")


def _link(
    svg: Element,
    boxes: list[tuple[str, str]],
    lit: Mapping[Chapter, set[str]],
    address: Callable[[Chapter], str],
) -> None:
    left = iter(boxes)
    part, words = next(left)
    children = list(svg)
    for box, text in pairwise(children):
        if box.tag != f"{{{SVG}}}rect" or text.text != words:
            continue
        chapter = home(part, lit)
        label = f"{words}: {chapter.title}"
        told = {"href": address(chapter), "data-parts": part, "aria-label": label}
        link = Element(f"{{{SVG}}}a", told)
        link.extend((box, text))
        svg.insert(list(svg).index(box), link)
        svg.remove(box)
        svg.remove(text)
        part, words = next(left, ("", ""))
    if part:
        raise ValueError(f"no box says {words!r}")
