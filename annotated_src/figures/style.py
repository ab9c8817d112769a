"""One look for every figure: colours that a colour-blind reader can tell apart."""

import io
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

# Okabe & Ito's palette, without the yellow that white paper swallows. The first four
# are made dark enough for words on white, and for white words on them.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#B94F00", "#007858", "#A2497A"
INK, GREY_INK = "#1B1F24", "#59626D"
SKY, AMBER, GREY = "#56B4E9", "#E69F00", "#8A929C"  # for areas and lines alone
PALE_ORANGE, PALE_BLUE = "#F3BE85", "#CFE4F5"  # behind words in ink
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER)

# The page shows a figure 672 px wide, as wide as its column, and its own text at 16 px.
WIDTH = 7.0  # inches, so that a point is as large in the figure as in the text
SIZE = 12.0  # points; nothing in a figure is smaller
DPI = 150
PALETTE = 128  # colours in the file of a figure; more are not to be seen

STYLE: dict[Any, Any] = {
    "font.size": SIZE,
    "axes.titlesize": SIZE + 1,
    "axes.labelsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "legend.fontsize": SIZE,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2,
    "image.cmap": "cividis",
    "svg.hashsalt": "book",
}


class BookFigure(Figure):
    """A figure that a notebook shows when it is a cell's value, and only then."""

    def _repr_png_(self) -> bytes:
        drawn, packed = io.BytesIO(), io.BytesIO()
        with plt.rc_context(STYLE):
            self.savefig(drawn, format="png")
        picture = Image.open(drawn).convert("RGB")
        # This keeps rare colours, a thin line's, near, and by kmeans common ones exact.
        few = picture.quantize(
            PALETTE, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
        )
        few.save(packed, format="png", optimize=True, dpi=(DPI, DPI))
        return packed.getvalue()


def ink_on(colour: Any) -> str:
    """Choose black or white for words on a colour, whichever stands out more."""
    parts = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in to_rgb(colour)
    ]
    light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return "white" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "black"


def panels(
    rows: int = 1, columns: int = 1, height: float = 3.4, **grid: Any
) -> tuple[BookFigure, list[Axes]]:
    """Make a figure in the book's style with a grid of axes, in reading order.

    Every figure is WIDTH inches wide; height is in inches too, of the whole figure.
    grid goes to `Figure.subplots`. The style stays in force, so that words which are
    added later get it.
    """
    plt.rcParams.update(STYLE)
    figure = BookFigure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, list(axes.flat)
