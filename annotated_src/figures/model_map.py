"""The map of the whole model, with the part that a chapter is about lit."""

from html import escape
from typing import NamedTuple

WIDTH, LEFT, BOX_WIDTH, BOX_HEIGHT, STEP = 460, 70, 220, 30, 42
BLOCK_ROWS = range(1, 9)  # the rows that repeat in every layer


class Row(NamedTuple):
    """One step of the computation, and the shape of what leaves it."""

    boxes: tuple[tuple[str, str], ...]  # (part, words) side by side
    shape: str


ROWS = (
    Row((("embedding", "embedding"),), "(B, T, D)"),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row((("attention", "q"), ("heads", "k"), ("heads", "v")), "N · H, and K · H twice"),
    Row((("rope", "rotate q"), ("rope", "rotate k")), "(B, N, T, H), (B, K, T, H)"),
    Row((("cache", "KV cache"),), "(B, K, S, H)"),
    Row((("attention", "scores, mask, softmax"),), "(B, N, T, S)"),
    Row((("attention", "weighted values, out"),), "(B, T, D)  +"),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row(
        (("ffn", "gate"), ("activations", "silu ×"), ("ffn", "up, down")),
        "(B, T, F)  +",
    ),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row((("head", "head"),), "(B, T, V)"),
)
PARTS = tuple(dict.fromkeys(part for row in ROWS for part, _ in row.boxes))


class ModelMap:
    """An SVG that a notebook displays; it follows the page's text colour.

    lit names parts of PARTS, or "everything".

    Raises:
        ValueError: no such part.
    """

    def __init__(self, *lit: str) -> None:
        unknown = [part for part in lit if part not in (*PARTS, "everything")]
        if unknown:
            raise ValueError(f"no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
        self.lit = set(PARTS) if "everything" in lit else set(lit)

    def _repr_html_(self) -> str:
        height = 60 + STEP * len(ROWS) + 20
        label = "Map of a decoder, from token ids to logits. Lit: " + (
            ", ".join(sorted(self.lit)) or "nothing"
        )
        parts = [
            f'<svg class="model-map" xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" style="max-width:100%" '
            f'font-family="sans-serif" font-size="14" fill="currentColor">',
            f"<title>{escape(label)}</title>",
            self._text(LEFT + BOX_WIDTH / 2, 24, "token ids (B, T)"),
            *(self._row(i, row) for i, row in enumerate(ROWS)),
            *self._block_frame(),
            self._text(LEFT + BOX_WIDTH / 2, height - 10, "logits"),
            "</svg>",
        ]
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"ModelMap({', '.join(sorted(self.lit))})"

    def _row(self, index: int, row: Row) -> str:
        y, gap = _top(index), 6
        width = (BOX_WIDTH - gap * (len(row.boxes) - 1)) / len(row.boxes)
        drawn = [_arrow(LEFT + BOX_WIDTH / 2, y - STEP + BOX_HEIGHT, y)]
        for i, (part, words) in enumerate(row.boxes):
            x = LEFT + i * (width + gap)
            fill = 'fill="#0072B2"' if part in self.lit else 'fill="none"'
            ink = "#ffffff" if part in self.lit else "currentColor"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX_HEIGHT}" '
                f'rx="5" stroke="currentColor" {fill}/>'
            )
            drawn.append(self._text(x + width / 2, y + 20, words, ink))
        drawn.append(
            self._text(
                LEFT + BOX_WIDTH + 16, y + 20, row.shape, size=12, anchor="start"
            )
        )
        return "\n".join(drawn)

    def _block_frame(self) -> list[str]:
        top, bottom = _top(BLOCK_ROWS[0]) - 9, _top(BLOCK_ROWS[-1]) + BOX_HEIGHT + 3
        frame = (
            f'<rect x="{LEFT - 30}" y="{top}" width="{BOX_WIDTH + 40}" '
            f'height="{bottom - top}" rx="9" fill="none" stroke="currentColor" '
            f'stroke-dasharray="4 4"/>'
        )
        # The residual stream passes each half of the block by.
        halves = [(1, 6), (7, 8)]
        paths = [
            f'<path d="M {LEFT + 40} {_top(a) - 5} H {LEFT - 15} '
            f"V {_top(b) + BOX_HEIGHT + 6} "
            f'H {LEFT + 40}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
            for a, b in halves
        ]
        return [frame, *paths, self._text(20, (top + bottom) / 2, "× L")]

    @staticmethod
    def _text(
        x: float,
        y: float,
        words: str,
        ink: str = "currentColor",
        size: int = 14,
        anchor: str = "middle",
    ) -> str:
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{ink}">{escape(words)}</text>'
        )


def _top(row: int) -> int:
    return 46 + STEP * row


def _arrow(x: float, y1: float, y2: float) -> str:
    return (
        f'<path d="M {x} {y1} V {y2} m -4 -6 l 4 6 l 4 -6" fill="none" '
        f'stroke="currentColor"/>'
    )
