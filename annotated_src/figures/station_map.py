"""The road from the files on disk to the text on the screen, with one station lit."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from annotated_src.figures.model_map import BLUE, svg_text

WIDTH = 528
BOX_WIDTH, BOX_HEIGHT = 176, 34
LEFT, RIGHT = 12, 264  # where the boxes of the two columns begin
BETWEEN = (LEFT + BOX_WIDTH + RIGHT) / 2


class Station(NamedTuple):
    """A box on the road, and what leaves it."""

    words: str
    x: int
    y: int
    leaves: str  # written below the box

    @property
    def middle(self) -> float:
        """Where a line meets it from the side."""
        return self.y + BOX_HEIGHT / 2


STATIONS = {
    "training": Station("training", LEFT, 36, "weights learnt"),
    "files": Station("files on disk", LEFT, 118, "names, bytes"),
    "loading": Station("from_pretrained", LEFT, 200, ""),
    "tokens": Station("text to ids", RIGHT, 36, "ids (B, T)"),
    "prefill": Station("prefill", RIGHT, 118, "logits (B, V), cache"),
    "sampling": Station("choose a token", RIGHT, 200, "one id a row"),
    "decode": Station("decode one step", RIGHT, 282, ""),
    "text": Station("ids to text", RIGHT, 352, ""),
}


class StationMap:
    """An SVG that a notebook displays; it takes the page's text colour.

    lit names stations, or "everything".

    Raises:
        ValueError: no such station.
    """

    road = "the road from a checkpoint to text"
    height = 404
    stations: Mapping[str, Station] = STATIONS
    columns = ("once", "for every prompt")
    down = (
        ("training", "files"),
        ("files", "loading"),
        ("tokens", "prefill"),
        ("prefill", "sampling"),
        ("sampling", "decode"),
    )

    def __init__(self, *lit: str) -> None:
        names = tuple(self.stations)
        unknown = [name for name in lit if name not in (*names, "everything")]
        if unknown:
            known = ", ".join(names)
            raise ValueError(f"no station {unknown[0]!r}; stations are {known}")
        self.lit = set(names) if "everything" in lit else set(lit)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self.lit))})"

    def _repr_html_(self) -> str:
        lit = ", ".join(sorted(self.lit)) or "nothing"
        centres = (LEFT + BOX_WIDTH / 2, RIGHT + BOX_WIDTH / 2)
        titles = zip(centres, self.columns, strict=True)
        return "\n".join(
            [
                f'<svg class="model-map" xmlns="http://www.w3.org/2000/svg" role="img" '
                f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
                f'style="max-width:100%" font-family="sans-serif" fill="currentColor">',
                f"<title>{escape(f'Map of {self.road}. Lit: {lit}')}</title>",
                *(svg_text(x, 20.0, words) for x, words in titles),
                *(_box(s, name in self.lit) for name, s in self.stations.items()),
                *(_down(*(self.stations[end] for end in pair)) for pair in self.down),
                *self.turns(),
                "</svg>",
            ]
        )

    def turns(self) -> list[str]:
        """Draw the lines that do not go straight down."""
        right_edge, turn = RIGHT + BOX_WIDTH, RIGHT + BOX_WIDTH + 34
        names = ("loading", "prefill", "sampling", "decode", "text")
        loading, prefill, sampling, decode, text = (
            self.stations[name].middle for name in names
        )
        return [
            # The model goes into prefill, and the token just chosen back into decode.
            line(
                f"M {LEFT + BOX_WIDTH} {loading:g} H {BETWEEN:g} V {prefill:g} "
                f"H {RIGHT} m -5 -4 l 5 4 l -5 4"
            ),
            line(
                f"M {right_edge} {decode:g} H {turn} V {sampling:g} H {right_edge}"
                " m 5 -4 l -5 4 l 5 4"
            ),
            line(
                f"M {RIGHT} {sampling + 8:g} H {BETWEEN:g} V {text:g} H {RIGHT}"
                " m -5 -4 l 5 4 l -5 4"
            ),
            svg_text(BETWEEN - 8, text - 6, "every id, at once", anchor="end"),
        ]


def line(path: str) -> str:
    """Draw a path in the page's text colour."""
    return f'<path d="{path}" fill="none" stroke="currentColor"/>'


def _box(station: Station, lit: bool) -> str:
    fill, ink = (BLUE, "#ffffff") if lit else ("none", "currentColor")
    centre = station.x + BOX_WIDTH / 2
    drawn = (
        f'<rect x="{station.x}" y="{station.y}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="5" stroke="currentColor" fill="{fill}"/>'
        + svg_text(centre, station.y + 22.0, station.words, ink=ink)
    )
    if station.leaves:
        below = station.y + BOX_HEIGHT + 28.0
        drawn += svg_text(centre + 8, below, station.leaves, anchor="start")
    return drawn


def _down(above: Station, below: Station) -> str:
    top, x = above.y + BOX_HEIGHT, above.x + BOX_WIDTH / 2
    return line(f"M {x:g} {top} V {below.y} m -4 -5 l 4 5 l 4 -5")
