"""The map of the whole model, with the part that a chapter is about lit."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, BOX_WIDTH, BOX_HEIGHT = 500.0, 78.0, 244.0, 32.0
CENTRE = LEFT + BOX_WIDTH / 2
BLUE = "#0072B2"
GAP, WIDE_GAP = 14.0, 40.0  # below a row; the wide one holds the plus of a residual


class Row(NamedTuple):
    """One step of the computation."""

    boxes: tuple[tuple[str, str], ...]  # (part, words), side by side
    shape: str  # of what leaves it
    adds: bool = False  # whether the residual stream is added after it


ROWS = (
    Row((("embedding", "embedding"),), "(B, T, D)"),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row((("attention", "q"), ("heads", "k"), ("heads", "v")), "q (B, N, T, H)"),
    Row((("rope", "rotate q"), ("rope", "rotate k")), "k, v (B, K, T, H)"),
    Row((("cache", "KV cache"),), "k, v (B, K, S, H)"),
    Row((("attention", "scores, mask, softmax"),), "(B, N, T, S)"),
    Row((("attention", "weigh values, project"),), "(B, T, D)", adds=True),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row((("ffn", "gate"), ("activations", "silu"), ("ffn", "up")), "(B, T, F)"),
    Row((("ffn", "multiply, down"),), "(B, T, D)", adds=True),
    Row((("norms", "RMSNorm"),), "(B, T, D)"),
    Row((("head", "head"),), "(B, T, V)"),
)
HALVES = ((1, 6), (7, 9))  # the rows that each residual passes by

CHATGLM_ROWS = (
    Row((("embedding", "embedding"),), "(B, T, D)"),
    Row((("norms", "LayerNorm"),), "(B, T, D)"),
    Row((("attention", "one product: q, k, v"),), "(B, N, T, 3H)"),
    Row((("positions", "place"), ("positions", "step")), "(B, 2, T)"),
    Row((("rope", "turn q, k: ½ each"),), "q, k (B, N, T, H)"),
    Row((("prefix", "KV cache, prefix first"),), "k, v (B, N, S, H)"),
    Row((("scores", "scores / l"), ("mask", "mask")), "(B, N, T, S)"),
    Row((("scores", "× l, softmax"),), "(B, N, T, S)"),
    Row((("attention", "weigh values, project"),), "(B, T, D)", adds=True),
    Row((("norms", "LayerNorm"),), "(B, T, D)"),
    Row((("ffn", "up"), ("ffn", "gelu"), ("ffn", "down")), "(B, T, D)", adds=True),
    Row((("norms", "LayerNorm"),), "(B, T, D)"),
    Row((("head", "head"),), "(B, T, V)"),
)
CHATGLM_HALVES = ((2, 8), (10, 10))  # here they start behind the norm


def parts_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Name every part once, from top to bottom."""
    return tuple(dict.fromkeys(part for row in rows for part, _ in row.boxes))


class ModelMap:
    """An SVG that a notebook displays; it takes the page's text colour.

    lit names parts of the model, or "everything".

    Raises:
        ValueError: no such part.
    """

    rows: Sequence[Row] = ROWS
    halves = HALVES
    frame = (1, 9)  # the rows that repeat
    scale = ""  # of the residual
    extra_parts: tuple[str, ...] = ()  # lit without a box

    def __init__(self, *lit: str) -> None:
        parts = (*parts_of(self.rows), *self.extra_parts)
        unknown = [part for part in lit if part not in (*parts, "everything")]
        if unknown:
            raise ValueError(f"no part {unknown[0]!r}; parts are {', '.join(parts)}")
        self.lit = set(parts) if "everything" in lit else set(lit)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self.lit))})"

    def _repr_html_(self) -> str:
        tops = _tops(self.rows)
        height = tops[-1] + BOX_HEIGHT + 46
        label = "Map of a decoder, from token ids to logits. Lit: " + (
            ", ".join(sorted(self.lit)) or "nothing"
        )
        return "\n".join(
            [
                f'<svg class="model-map" xmlns="http://www.w3.org/2000/svg" role="img" '
                f'viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" '
                f'style="max-width:100%" font-family="sans-serif" fill="currentColor">',
                f"<title>{escape(label)}</title>",
                svg_text(CENTRE, 22.0, "token ids (B, T)"),
                _arrow(28.0, tops[0]),
                *(self._row(*at) for at in zip(self.rows, tops, strict=True)),
                *self._block(tops),
                svg_text(CENTRE, height - 10, "logits, one row per token"),
                "</svg>",
            ]
        )

    def _row(self, row: Row, top: float) -> str:
        width = (BOX_WIDTH - 6 * (len(row.boxes) - 1)) / len(row.boxes)
        drawn = [svg_text(LEFT + BOX_WIDTH + 22, top + 21.5, row.shape, anchor="start")]
        for i, (part, words) in enumerate(row.boxes):
            x = LEFT + i * (width + 6)
            lit = part in self.lit
            fill, ink = (BLUE, "#ffffff") if lit else ("none", "currentColor")
            drawn.append(
                f'<rect x="{x:.1f}" y="{top:g}" width="{width:.1f}" '
                f'height="{BOX_HEIGHT:g}" rx="5" stroke="currentColor" fill="{fill}"/>'
            )
            drawn.append(svg_text(x + width / 2, top + 21.5, words, ink=ink))
        bottom = top + BOX_HEIGHT
        if row.adds:
            drawn.append(_arrow(bottom, bottom + 5))
            drawn.append(_arrow(bottom + 25, bottom + WIDE_GAP))
        else:
            drawn.append(_arrow(bottom, bottom + GAP))
        return "\n".join(drawn)

    def _block(self, tops: list[float]) -> list[str]:
        """Draw the frame of what repeats, and the residual past each half of it."""
        drawn = []
        lit = "residual" in self.lit and self.extra_parts
        ink = BLUE if lit else "currentColor"
        for first, last in self.halves:
            start, plus = tops[first] - 7, tops[last] + BOX_HEIGHT + 15
            drawn.append(
                f'<path d="M {CENTRE:g} {start:g} H {LEFT - 16:g} V {plus:g} '
                f'H {CENTRE - 10:g}" fill="none" stroke="{ink}" '
                f'stroke-width="{4 if lit else 2.5}"/>'
            )
            if self.scale:
                drawn.append(svg_text(LEFT + 44, plus + 16, self.scale))
            drawn.append(
                f'<circle cx="{CENTRE:g}" cy="{plus:g}" r="10" fill="none" '
                f'stroke="currentColor"/>' + svg_text(CENTRE, plus + 5.5, "+", 17)
            )
        top = tops[self.frame[0]] - 11
        bottom = tops[self.frame[1]] + BOX_HEIGHT + (36 if self.scale else 30)
        drawn.append(
            f'<rect x="{LEFT - 28:g}" y="{top:g}" width="{BOX_WIDTH + 40:g}" '
            f'height="{bottom - top:g}" rx="9" fill="none" '
            f'stroke="currentColor" stroke-dasharray="4 4"/>'
        )
        drawn.append(svg_text(LEFT - 52, (top + bottom) / 2, "× L"))
        return drawn


class ChatGLMMap(ModelMap):
    """The same for ChatGLM; "residual" lights the lines past the blocks."""

    rows = CHATGLM_ROWS
    halves = CHATGLM_HALVES
    frame = (1, 10)
    scale = "× α"
    extra_parts = ("residual",)


def _tops(rows: Sequence[Row]) -> list[float]:
    tops = [42.0]
    for row in rows[:-1]:
        tops.append(tops[-1] + BOX_HEIGHT + (WIDE_GAP if row.adds else GAP))
    return tops


def svg_text(
    x: float,
    y: float,
    words: str,
    size: int = 16,
    anchor: str = "middle",
    ink: str = "currentColor",
) -> str:
    """Write words at a place; y is their baseline."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{ink}">{escape(words)}</text>'
    )


def _arrow(top: float, bottom: float) -> str:
    head = "m -4 -5 l 4 5 l 4 -5" if bottom - top > 9 else ""
    return (
        f'<path d="M {CENTRE:g} {top:g} V {bottom:g} {head}" fill="none" '
        f'stroke="currentColor"/>'
    )
