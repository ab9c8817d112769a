"""One look for every figure: colours that a colour-blind reader can tell apart."""

import io
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, without the yellow that white paper swallows.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, INK, GREY = "#56B4E9", "#E69F00", "#1B1F24", "#8A929C"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER)

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "legend.fontsize": 11,
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
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def panels(
    rows: int = 1,
    columns: int = 1,
    width: float = 7.2,
    height: float = 3.4,
    **grid: Any,
) -> tuple[BookFigure, list[Axes]]:
    """Make a figure in the book's style with a grid of axes, in reading order.

    width and height are in inches, of the whole figure; grid goes to
    `Figure.subplots`.
    """
    with plt.rc_context(STYLE):
        figure = BookFigure(figsize=(width, height), layout="constrained", dpi=150)
        axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, list(axes.flat)
