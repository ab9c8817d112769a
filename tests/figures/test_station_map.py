"""The roads light the station they are asked to; nothing leaves the picture."""

from xml.etree import ElementTree

import pytest

from annotated_src.figures.device_map import DeviceMap
from annotated_src.figures.station_map import StationMap

SVG = "{http://www.w3.org/2000/svg}"
MAPS = [StationMap, DeviceMap]
EACH = [(road, name) for road in MAPS for name in road.stations]
each_map = pytest.mark.parametrize("road", MAPS)


def drawn(road, *lit):
    return ElementTree.fromstring(road(*lit)._repr_html_())


@pytest.mark.parametrize(("road", "name"), EACH)
def test_exactly_one_box_is_lit(road, name):
    lit = [box.attrib["fill"] != "none" for box in drawn(road, name).iter(SVG + "rect")]
    assert lit == [n == name for n in road.stations]


@each_map
def test_everything_and_nothing(road):
    for lit, fills in (("everything",), {"#0072B2"}), ((), {"none"}):
        boxes = drawn(road, *lit).iter(SVG + "rect")
        assert {box.attrib["fill"] for box in boxes} == fills


def test_the_title_says_what_is_lit():
    title = drawn(StationMap, "files", "decode").find(SVG + "title").text
    assert "Lit: decode, files" in title
    assert "a device. Lit: running" in drawn(DeviceMap, "running")[0].text


@each_map
def test_boxes_and_words_stay_inside_and_apart(road):
    root = drawn(road)
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
        assert float(text.attrib["font-size"]) >= 16


def test_an_unknown_station():
    with pytest.raises(ValueError, match="no station 'gate'; stations are training"):
        StationMap("gate")
    with pytest.raises(ValueError, match="no station 'files'; stations are authoring"):
        DeviceMap("files")
