"""Look at every figure that a test draws, as readers see it; a fault fails the test.

A figure is shown 672 px wide, beside text of 16 px. What is checked at that size: words
are no smaller than the text, lie inside the figure and not on each other, and stand out
from what is behind them; colours that tell things apart do so in grey and to the colour
blind, unless the things are named or drawn differently.
"""

from itertools import combinations
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import ListedColormap, to_hex, to_rgb, to_rgba
from matplotlib.contour import ContourSet
from matplotlib.text import Text

from annotated_src.figures.style import BookFigure

WIDE = 672
LEAST_PX = 16
CONTRAST, LARGE_CONTRAST, LARGE_PX = 4.5, 3.0, 24  # WCAG 2.2, 1.4.3
REACH_PX = 6  # from the middle of a word to that of the dot it stands on
CLEAR = 0.9  # of the pixels of some words: a thin line may run behind them
APART, APART_IN_GREY = 10, 7  # distances in CIELAB
# Machado, Oliveira and Fernandes 2009, on linear RGB, nothing left of one cone.
BLIND = {
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


@pytest.fixture(autouse=True)
def legible(monkeypatch):
    """Check what each test of a figure draws."""
    drawn, create = [], BookFigure.__init__

    def remember(self, *args, **options):
        create(self, *args, **options)
        drawn.append(self)

    monkeypatch.setattr(BookFigure, "__init__", remember)
    yield drawn
    found = [fault for figure in drawn for fault in faults_of(figure)]
    assert not found, "\n".join(found)


@pytest.fixture
def faults():
    return faults_of


def faults_of(figure):
    """List in words what a reader of the figure would stumble over."""
    dpi = figure.dpi
    figure.set_dpi(WIDE / figure.get_figwidth())
    try:
        texts, shown, bare = pictures(figure)
        corners = [corners_of(text) for text in texts]
        found = [*words_faults(texts, corners, bare), *contrast(texts, shown, bare)]
        for ax in figure.axes:
            inside = [text for text in texts if text.axes in (ax, None)]
            found += colour_faults(ax, inside)
        return found
    finally:
        figure.set_dpi(dpi)


def pictures(figure):
    """Draw with words and without; list the words that are really drawn."""
    texts, draw = [], Text.draw

    def note(self, renderer):
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        draw(self, renderer)

    canvas = FigureCanvasAgg(figure)
    with mock.patch.object(Text, "draw", note):
        canvas.draw()
    shown = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    texts = list(dict.fromkeys(texts))
    with mock.patch.object(Text, "draw", only_frame):
        canvas.draw()
    bare = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    return texts, shown, bare


def only_frame(text, renderer):
    """Draw the paper that a text may lie on, not its words."""
    if (box := text.get_bbox_patch()) and text.get_visible():
        text.update_bbox_position_size(renderer)
        box.draw(renderer)


def corners_of(text):
    """Find the four corners of some words, turned words included, in pixels."""
    angle = text.get_rotation()
    upright = text.get_window_extent()
    centre = np.array([upright.x0 + upright.x1, upright.y0 + upright.y1]) / 2
    if angle % 90:
        text.set_rotation(0)
        upright = text.get_window_extent()
        text.set_rotation(angle)
    half = np.array([upright.width, upright.height]) / 2
    if not angle % 90:
        angle = 0
    half = np.maximum(half - [1, 2], 0.5)  # the room above x and beside it
    turn = np.deg2rad(angle)
    across = np.array([np.cos(turn), np.sin(turn)]) * half[0]
    up = np.array([-np.sin(turn), np.cos(turn)]) * half[1]
    return np.array([centre + i * across + j * up for i in (-1, 1) for j in (-1, 1)])


def words_faults(texts, corners, picture):
    height, width, _ = picture.shape
    for text, at in zip(texts, corners, strict=True):
        size = text.get_size() * text.get_figure(root=True).dpi / 72
        if size < LEAST_PX - 0.01:
            yield f"{text.get_text()!r} is {size:.1f} px high"
        if (at < -1).any() or (at > (width + 1, height + 1)).any():
            yield f"{text.get_text()!r} leaves the figure"
    for (one, here), (other, there) in combinations(
        zip(texts, corners, strict=True), 2
    ):
        if touch(here, there):
            yield f"{one.get_text()!r} lies on {other.get_text()!r}"


def touch(one, other):
    """Say whether two rectangles do; a line between them runs along a side of one."""
    for corners in (one, other):
        for side in (corners[1] - corners[0], corners[2] - corners[0]):
            here, there = one @ side, other @ side
            if here.max() <= there.min() or there.max() <= here.min():
                return False
    return True


def contrast(texts, shown, bare):
    """Compare each pixel of the words with what is behind it."""
    height, width, _ = bare.shape
    written = np.abs(shown - bare).max(axis=-1) > 60
    behind = luminance(bare / 255)
    for text in texts:
        box = text.get_window_extent()
        rows = slice(max(0, int(height - box.y1)), max(0, int(height - box.y0)) + 1)
        columns = slice(max(0, int(box.x0)), min(width, int(box.x1) + 1))
        paper = behind[rows, columns][written[rows, columns]]
        ink = luminance(np.array(to_rgb(text.get_color())))
        ratio = (np.maximum(paper, ink) + 0.05) / (np.minimum(paper, ink) + 0.05)
        large = text.get_size() * text.get_figure(root=True).dpi / 72 >= LARGE_PX
        least = LARGE_CONTRAST if large else CONTRAST
        if not len(paper) or (ratio >= least).mean() < CLEAR:
            worst = np.quantile(ratio, 1 - CLEAR) if len(paper) else 1
            yield f"{text.get_text()!r} has a contrast of {worst:.1f}"


def colour_faults(ax, texts):
    """Compare each pair of colours of lines, areas and dots."""
    looks, inks = {}, {}
    for colour, look in (*lines_of(ax), *areas_of(ax), *cells_of(ax)):
        seen = to_hex(over_white(colour))
        looks.setdefault(seen, set()).add(look)
        inks.setdefault(seen, set()).add(to_hex(colour))
    said = {to_hex(text.get_color()) for text in texts}
    named = {seen for seen in looks if inks[seen] & said} | labelled(ax, texts)
    for one, other in combinations(looks, 2):
        if looks[one].isdisjoint(looks[other]) or {one, other} & named:
            continue
        grey = abs(lab(one)[0] - lab(other)[0])
        if grey < APART_IN_GREY:
            yield f"{one} and {other} are one grey, {grey:.1f} apart"
        for who, cones in BLIND.items():
            distance = np.linalg.norm(lab(one, cones) - lab(other, cones))
            if distance < APART:
                yield f"to a {who} {one} and {other} are {distance:.1f} apart"
    yield from scale_faults(ax, texts)


def scale_faults(ax, texts):
    """Ask colours that stand for numbers to grow darker or lighter, or be labelled."""
    for drawn in (*ax.images, *filter(of_numbers, ax.collections)):
        if few(drawn.cmap) or any(isinstance(c, ContourSet) for c in ax.collections):
            continue
        light = np.diff([lab(colour)[0] for colour in drawn.cmap(range(256))])
        if not ((light > 0).all() or (light < 0).all() or labelled(ax, texts)):
            yield f"the colours {drawn.cmap.name} neither rise nor fall in grey"


def few(colours):
    return isinstance(colours, ListedColormap) and colours.N <= 8


def of_numbers(drawn):
    return drawn.get_array() is not None


def lines_of(ax):
    for line in ax.lines:
        if line.get_visible() and len(line.get_xdata()):
            width = round(line.get_linewidth())
            look = ("line", str(line.get_linestyle()), line.get_marker(), width)
            yield to_rgba(line.get_color(), line.get_alpha()), look


def areas_of(ax):
    for patch in ax.patches:
        if patch.get_visible() and patch.get_facecolor()[3]:
            yield patch.get_facecolor(), (type(patch).__name__, patch.get_hatch())
    for drawn in ax.collections:
        look = "dots" if isinstance(drawn, PathCollection) else "area"
        for colour in () if of_numbers(drawn) else map(tuple, drawn.get_facecolor()):
            yield colour, (look, drawn.get_hatch())


def cells_of(ax):
    for image in filter(lambda image: few(image.cmap), ax.images):
        used = image.cmap(image.norm(np.unique(image.get_array().compressed())))
        yield from ((tuple(colour), "cell") for colour in used)


def labelled(ax, texts):
    """Collect the colours of areas and dots with a word on them."""
    found = set()
    places = np.array([corners_of(text).mean(axis=0) for text in texts])
    for line in ax.lines:
        dots = line.get_transform().transform(line.get_xydata())
        if len(dots) == 1 and np.hypot(*(places - dots).T).min(initial=99) < REACH_PX:
            found.add(to_hex(line.get_color()))
    for patch in ax.patches:
        if patch.get_facecolor()[3]:
            box = patch.get_window_extent()
            if any(box.contains(*place) for place in places):
                found.add(to_hex(over_white(patch.get_facecolor())))
    return found


def over_white(colour):
    *rgb, alpha = to_rgba(colour)
    return tuple(alpha * np.array(rgb) + 1 - alpha)


def linear(rgb):
    rgb = np.asarray(rgb, dtype=float)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def luminance(rgb):
    return linear(rgb) @ XYZ[1]


def lab(colour, cones=None):
    """Place a colour in CIELAB, where distances are about those that eyes see."""
    light = linear(to_rgb(colour))
    if cones is not None:
        light = np.clip(np.array(cones) @ light, 0, 1)
    t = XYZ @ light / XYZ.sum(axis=1)
    x, y, z = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
