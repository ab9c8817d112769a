"""The road from the files on disk to the text on the screen, with one station lit."""

from html import escape
from typing import NamedTuple

from annotated_src.figures.model_map import BLUE, svg_text

WIDTH, HEIGHT = 480, 404
BOX_WIDTH, BOX_HEIGHT = 176, 34
LEFT, RIGHT = 12, 264  # where the boxes of the two columns begin


class Station(NamedTuple):
    """A box on the road, and what leaves it."""

    words: str
    x: int
    y: int
    leaves: str  # written below the box


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
DOWN = (("training", "files"), ("files", "loading"), ("tokens", "prefill"))
DOWN += (("prefill", "sampling"), ("sampling", "decode"))


class StationMap:
    """An SVG that a notebook displays; it takes the page's text colour.

    lit names stations, or "everything".

    Raises:
        ValueError: no such station.
    """

    def __init__(self, *lit: str) -> None:
        unknown = [name for name in lit if name not in (*STATIONS, "everything")]
        if unknown:
            known = ", ".join(STATIONS)
            raise ValueError(f"no station {unknown[0]!r}; stations are {known}")
        self.lit = set(STATIONS) if "everything" in lit else set(lit)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self.lit))})"

    def _repr_html_(self) -> str:
        label = "Map of the road from a checkpoint to text. Lit: " + (
            ", ".join(sorted(self.lit)) or "nothing"
        )
        right_edge, turn = RIGHT + BOX_WIDTH, RIGHT + BOX_WIDTH + 26
        sampling, decode, text = (
            STATIONS[name].y + BOX_HEIGHT / 2 for name in ("sampling", "decode", "text")
        )
        loading, prefill = (
            STATIONS[name].y + BOX_HEIGHT / 2 for name in ("loading", "prefill")
        )
        middle = (LEFT + BOX_WIDTH + RIGHT) / 2
        paths = [
            # The model goes into prefill, and the token just chosen back into decode.
            f"M {LEFT + BOX_WIDTH} {loading:g} H {middle:g} V {prefill:g} H {RIGHT}"
            " m -5 -4 l 5 4 l -5 4",
            f"M {right_edge} {decode:g} H {turn} V {sampling:g} H {right_edge}"
            " m 5 -4 l -5 4 l 5 4",
            f"M {RIGHT} {sampling + 8:g} H {middle:g} V {text:g} H {RIGHT}"
            " m -5 -4 l 5 4 l -5 4",
        ]
        return "\n".join(
            [
                f'<svg class="model-map" xmlns="http://www.w3.org/2000/svg" role="img" '
                f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'style="max-width:100%" font-family="sans-serif" fill="currentColor">',
                f"<title>{escape(label)}</title>",
                svg_text(LEFT + BOX_WIDTH / 2, 20.0, "once", 13),
                svg_text(RIGHT + BOX_WIDTH / 2, 20.0, "for every prompt", 13),
                *(_box(name, name in self.lit) for name in STATIONS),
                *(_down(*pair) for pair in DOWN),
                *(_line(path) for path in paths),
                svg_text(middle - 8, text - 6, "every id, at once", 13, "end"),
                "</svg>",
            ]
        )


def _box(name: str, lit: bool) -> str:
    station = STATIONS[name]
    fill, ink = (BLUE, "#ffffff") if lit else ("none", "currentColor")
    centre = station.x + BOX_WIDTH / 2
    drawn = (
        f'<rect x="{station.x}" y="{station.y}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="5" stroke="currentColor" fill="{fill}"/>'
        + svg_text(centre, station.y + 22.0, station.words, 15, ink=ink)
    )
    if station.leaves:
        below = station.y + BOX_HEIGHT + 28.0
        drawn += svg_text(centre + 8, below, station.leaves, 13, "start")
    return drawn


def _down(start: str, end: str) -> str:
    above, below = STATIONS[start], STATIONS[end]
    top, x = above.y + BOX_HEIGHT, above.x + BOX_WIDTH / 2
    return _line(f"M {x:g} {top} V {below.y} m -4 -5 l 4 5 l 4 -5")


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="currentColor"/>'
