"""The style keeps its promises, and the check of every figure sees what is wrong."""

import ast
import io
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from PIL import Image

from annotated_src import figures
from annotated_src.figures import style
from annotated_src.figures.style import BLUE, GREEN, GREY, INK, ORANGE, SKY, panels

INKS = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.INK, style.GREY_INK)


def picture():
    figure, (ax,) = panels(height=2.0)
    ax.plot([0, 1], [0, 1], color=BLUE)
    ax.set(xlabel="tokens", title="A line")
    return figure, ax


@pytest.fixture
def drawn():
    return picture()


def said(faults, legible, figure):
    """List the faults of a figure that is meant to have some."""
    legible.clear()
    return faults(figure)


def test_a_plain_figure_is_legible(drawn, faults):
    assert faults(drawn[0]) == []


def test_words_are_as_large_as_the_text_beside_them(drawn, faults, legible):
    figure, ax = drawn
    ax.text(0.1, 0.7, "small", size=style.SIZE - 1)
    assert said(faults, legible, figure) == ["'small' is 14.7 px high"]


def test_words_lie_on_no_others(drawn, faults, legible):
    figure, ax = drawn
    ax.text(0.1, 0.7, "under")
    ax.text(0.12, 0.72, "over")
    assert "'under' lies on 'over'" in said(faults, legible, figure)


def test_turned_words_may_be_neighbours(drawn, faults):
    figure, ax = drawn
    ax.text(0.1, 0.3, "a long slanted text", rotation=30, color=INK)
    ax.text(0.3, 0.3, "another", rotation=30, color=INK)
    assert faults(figure) == []


def test_words_stay_in_the_figure(drawn, faults, legible):
    figure, ax = drawn
    ax.text(0.9, 0.1, "far too long for its place", in_layout=False)
    assert any("leaves the figure" in fault for fault in said(faults, legible, figure))


@pytest.mark.parametrize(("ink", "paper"), [("#999999", "white"), (INK, BLUE)])
def test_words_stand_out(drawn, faults, legible, ink, paper):
    figure, ax = drawn
    ax.axvspan(0, 0.5, color=paper)
    ax.text(0.1, 0.7, "faint", color=ink)
    (fault,) = (f for f in said(faults, legible, figure) if "faint" in f)
    assert fault.startswith("'faint' has a contrast of ")


def test_words_on_a_line_of_their_colour_are_seen(drawn, faults, legible):
    figure, ax = drawn
    ax.axhline(0.5, color=BLUE, lw=20)
    ax.text(0.7, 0.5, "gone", color=BLUE, va="center")
    assert any("'gone' has a contrast" in f for f in said(faults, legible, figure))


def test_lines_of_one_grey_need_a_name_or_another_look(faults, legible):
    def lines(**look):
        figure, (ax,) = panels(height=2.0)
        ax.plot([0, 1], color=BLUE)
        ax.plot([1, 0], color=ORANGE, **look)
        return figure, ax

    figure, ax = lines()
    (fault,) = said(faults, legible, figure)
    assert "are one grey" in fault
    assert faults(lines(linestyle="--")[0]) == []
    ax.text(0.45, 0.8, "named", color=ORANGE)
    assert faults(figure) == []


@pytest.mark.parametrize(
    ("one", "other", "blind"),
    [("#C00000", "#5A5A00", "protanope"), ("#D04060", "#7E8060", "deuteranope")],
)
def test_colours_that_the_blind_take_for_one(faults, legible, one, other, blind):
    figure, (ax,) = panels(height=2.0)
    ax.bar([0, 1], [1, 2], color=[one, other])
    assert any(f"to a {blind}" in fault for fault in said(faults, legible, figure))


def test_a_word_on_a_bar_names_it(faults, legible):
    figure, (ax,) = panels(height=2.0)
    ax.bar([0, 1], [1, 1], color=[BLUE, GREEN])
    assert "are one grey" in said(faults, legible, figure)[0]
    ax.text(0, 0.5, "one", ha="center", color="white")
    assert faults(figure) == []


def test_numbers_as_colours_rise_in_grey(faults, legible):
    def field(colours):
        figure, (ax,) = panels(height=2.0)
        ax.imshow(np.eye(3), cmap=colours)
        return figure

    assert faults(field("cividis")) == []
    bent = LinearSegmentedColormap.from_list("bent", (ORANGE, "white", BLUE))
    assert "neither rise nor fall" in said(faults, legible, field(bent))[0]
    assert faults(field(ListedColormap([SKY, BLUE]))) == []
    assert "one grey" in said(faults, legible, field(ListedColormap([GREEN, BLUE])))[0]


def test_inks_are_for_words_and_for_words_on_them(drawn, faults):
    figure, ax = drawn
    for row, ink in enumerate(INKS):
        ax.text(0.02 + row / 6, 1.1, "words", color=ink, transform=ax.transAxes)
        ax.axvspan(row, row + 1, ymin=0.3, ymax=0.6, color=ink)
        ax.text(row + 0.5, 0.45, "white", color="white", ha="center")
    ax.set(xlim=(0, 6), ylim=(0, 1), title="")
    assert faults(figure) == []


@pytest.mark.parametrize("colour", [*INKS, GREY, SKY, style.AMBER, "white", "#777777"])
def test_ink_on_a_colour_stands_out(drawn, faults, colour):
    figure, ax = drawn
    ax.axhspan(0.4, 0.6, color=colour)
    ax.text(0.2, 0.5, "words", va="center", color=style.ink_on(colour))
    assert faults(figure) == []


def test_a_file_has_few_colours_near_those_drawn_and_is_always_the_same(drawn):
    figure, ax = drawn
    ax.imshow(np.random.default_rng(0).random((30, 30)), extent=(0, 1, 0, 1))
    packed = figure._repr_png_()
    assert packed == figure._repr_png_()
    plain = io.BytesIO()
    figure.savefig(plain, format="png")
    few = Image.open(io.BytesIO(packed))
    assert few.size == (style.WIDTH * style.DPI, 2 * style.DPI)
    assert len(few.getcolors()) <= style.PALETTE
    exact = np.asarray(Image.open(plain).convert("RGB")).astype(int)
    seen = np.asarray(few.convert("RGB")).astype(int)
    assert np.abs(seen - exact).max() <= 16
    assert (seen[exact.min(axis=-1) == 255] == 255).all()  # paper stays white
    assert len(packed) < len(plain.getvalue()) / 2


def test_every_figure_is_drawn_by_a_test_of_its_module():
    here = Path(__file__).parent
    for module in iter_modules(figures.__path__):
        names = vars(import_module(f"{figures.__name__}.{module.name}"))
        draws = {name for name in names if name.startswith("draw_")}
        test = here / f"test_{module.name}.py"
        if module.name == "norm_placement":
            test = here / "test_norms.py"
        called = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(test.read_text() if draws else ""))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert draws <= called, module.name
