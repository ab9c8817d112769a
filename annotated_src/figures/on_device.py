"""Pictures of a step on the device: which bytes move for one token."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from matplotlib.patches import Patch

from annotated_src.figures.cache import product_weights
from annotated_src.figures.style import AMBER, BLUE, INK, PALE_BLUE, BookFigure, panels
from annotated_src.models.llama import LlamaConfig

PARTS = {
    "weights": (BLUE, "weights, read"),
    "attended": (PALE_BLUE, "cache, read by attention"),
    "copied": (AMBER, "cache, copied: read, and written"),
}


class StepBytes(NamedTuple):
    """The bytes that one decode step must move, by what they are."""

    weights: int  # every matrix once, with the scales of its rows
    attended: int  # the cache, read by attention: every place, filled or not
    copied: int  # the cache again: each copy of it is read, and written

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def cache_bytes(config: LlamaConfig, cache_len: int) -> int:
    """Count the bytes of keys and values in float32, for so many places."""
    per_place = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return 4 * per_place * cache_len


def matrix_rows(config: LlamaConfig) -> int:
    """Count the rows of all matrices that multiply a token: each has one scale."""
    c = config
    attention = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.embed_dim
    return c.num_layers * (attention + 2 * c.ffn_dim + c.embed_dim) + c.vocab_size


def step_bytes(
    config: LlamaConfig, cache_len: int, width: int = 4, copies: int = 3
) -> StepBytes:
    """Count what one step moves, with weights of so many bytes.

    Of the cache, copies are made: 3 where it goes in and out as arrays (in, the new
    one, out), 1 where buffers change places, 0 where the step writes into its input.

    Raises:
        ValueError: width is not 1 or 4.
    """
    if width not in (1, 4):
        raise ValueError(f"a weight takes 1 byte or 4 here, got {width}")
    scales = 4 * matrix_rows(config) if width == 1 else 0
    kept = cache_bytes(config, cache_len)
    weights = width * product_weights(config) + scales
    return StepBytes(weights, kept, 2 * copies * kept)


class BudgetData(NamedTuple):
    """How a model is stored and run, one saving more each time, and what moves then."""

    cache_len: int
    rows: dict[str, StepBytes]


def budget_data(config: LlamaConfig, cache_len: int) -> BudgetData:
    """Begin with no saving: float32, and keys and values for every query head."""
    unshared = replace(config, num_kv_heads=config.num_heads)
    rows = {
        "no saving": step_bytes(unshared, cache_len),
        "GQA": step_bytes(config, cache_len),
        "GQA, int8": step_bytes(config, cache_len, 1),
        "GQA, int8, no copies": step_bytes(config, cache_len, 1, copies=0),
    }
    return BudgetData(cache_len, rows)


def draw_budgets(budgets: Sequence[BudgetData]) -> BookFigure:
    """Draw one panel a length of cache, one bar a way to run it."""
    figure, axes = panels(len(budgets), 1, height=3.0 * len(budgets) + 0.5, sharex=True)
    widest = max(row.total for data in budgets for row in data.rows.values()) / 1e6
    for ax, data in zip(axes, budgets, strict=True):
        for y, (name, row) in enumerate(data.rows.items()):
            left = 0.0
            for part, num_bytes in row._asdict().items():
                colour = PARTS[part][0]
                ax.barh(y, num_bytes / 1e6, left=left, color=colour, height=0.42)
                left += num_bytes / 1e6
            ax.text(0, y - 0.27, name, va="bottom", color=INK)
            total = f" {left:,.0f} MB"
            ax.text(left, y, total, va="center", color=INK)
        ax.set(ylim=(len(data.rows) - 0.6, -0.75), xlim=(0, widest * 1.16), yticks=[])
        ax.set_title(f"A cache of {data.cache_len:,} places", loc="left")
        ax.spines["left"].set_visible(False)
    axes[-1].set_xlabel("megabytes for each token that is written")
    keys = [Patch(color=colour, label=words) for colour, words in PARTS.values()]
    figure.legend(handles=keys, loc="outside upper left")
    return figure
