"""The road lights the station it is asked to; nothing leaves the picture."""

from xml.etree import ElementTree

import pytest

from annotated_src.figures.station_map import STATIONS, StationMap

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*lit):
    return ElementTree.fromstring(StationMap(*lit)._repr_html_())


@pytest.mark.parametrize("name", STATIONS)
def test_exactly_one_box_is_lit(name):
    boxes = [box.attrib for box in drawn(name).iter(SVG + "rect")]
    assert [box["fill"] != "none" for box in boxes] == [n == name for n in STATIONS]


def test_everything_and_nothing():
    for lit, fills in (("everything",), {"#0072B2"}), ((), {"none"}):
        assert {box.attrib["fill"] for box in drawn(*lit).iter(SVG + "rect")} == fills


def test_the_title_says_what_is_lit():
    assert "Lit: decode, files" in drawn("files", "decode").find(SVG + "title").text


def test_boxes_and_words_stay_inside_and_apart():
    root = drawn("files")
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes = [
        tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        for box in root.iter(SVG + "rect")
    ]
    for x, y, w, h in boxes:
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, other_w, other_h in boxes[:i]:
            assert x >= u + other_w or u >= x + w or y >= v + other_h or v >= y + h
    for text in root.iter(SVG + "text"):
        assert 0 < float(text.attrib["y"]) < height


def test_an_unknown_station():
    with pytest.raises(ValueError, match="no station 'gate'; stations are training"):
        StationMap("gate")
