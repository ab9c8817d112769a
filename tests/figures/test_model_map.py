"""The model map lights what it is asked to, and draws nothing over anything else."""

from xml.etree import ElementTree

import pytest

from annotated_src.figures.model_map import (
    BOX_HEIGHT,
    ChatGLMMap,
    ModelMap,
    parts_of,
)
from annotated_src.figures.style import panels

SVG = "{http://www.w3.org/2000/svg}"


def boxes(model_map):
    """The boxes of the parts: position, size and fill, in drawing order."""
    root = ElementTree.fromstring(model_map._repr_html_())
    found = [
        r.attrib for r in root.iter(SVG + "rect") if "stroke-dasharray" not in r.attrib
    ]
    return root, found


each_map = pytest.mark.parametrize("draw", [ModelMap, ChatGLMMap])


@pytest.mark.parametrize(
    ("draw", "part"),
    [(m, part) for m in (ModelMap, ChatGLMMap) for part in parts_of(m.rows)],
)
def test_exactly_the_boxes_of_a_part_are_lit(draw, part):
    _, drawn = boxes(draw(part))
    lit = [box["fill"] != "none" for box in drawn]
    assert lit == [name == part for row in draw.rows for name, _ in row.boxes]


@each_map
def test_everything_lights_everything(draw):
    _, drawn = boxes(draw("everything"))
    assert all(box["fill"] != "none" for box in drawn)


def test_the_residual_of_chatglm_is_a_part_too():
    assert "#0072B2" in ChatGLMMap("residual")._repr_html_()
    assert "#0072B2" not in ChatGLMMap()._repr_html_()
    with pytest.raises(ValueError, match="no part 'residual'"):
        ModelMap("residual")


@each_map
def test_boxes_do_not_overlap_and_stay_inside(draw):
    root, drawn = boxes(draw())
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    corners = [(float(b["x"]), float(b["y"]), float(b["width"])) for b in drawn]
    for i, (x, y, w) in enumerate(corners):
        assert x >= 0
        assert x + w <= width
        assert y + BOX_HEIGHT <= height
        for other_x, other_y, other_w in corners[i + 1 :]:
            apart = other_x >= x + w or x >= other_x + other_w
            assert apart or abs(other_y - y) >= BOX_HEIGHT


@each_map
def test_words_are_as_large_as_the_text_beside_them(draw):
    root, _ = boxes(draw())
    assert all(float(t.attrib["font-size"]) >= 16 for t in root.iter(SVG + "text"))


def test_the_title_says_what_is_lit():
    root, _ = boxes(ModelMap("rope", "cache"))
    assert root.find(SVG + "title").text.endswith("Lit: cache, rope")


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="no part 'heart'; parts are embedding"):
        ModelMap("norms", "heart")


def test_panels_come_in_reading_order_and_print_as_png():
    figure, axes = panels(2, 3)
    assert [axis.get_subplotspec().num1 for axis in axes] == list(range(6))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure._repr_png_() == figure._repr_png_()
