"""Pictures of the KV cache: what is computed at each step, and what a text costs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.figures.style import (
    BLUE,
    GREY_INK,
    INK,
    ORANGE,
    PALE_ORANGE,
    BookFigure,
    panels,
)
from annotated_src.kv_cache import LayerCache, cached_length
from annotated_src.models.llama import Llama, LlamaConfig

SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_dim=1536,
    max_seq_len=8192,
    norm_eps=1e-5,
    rope_base=100_000.0,
    tied_head=True,
)
"""The sizes of SmolLM2-135M."""

# Three greys when printed without colour; the ink on the last is dark enough to read.
NEW, AGAIN, READ, READ_INK = BLUE, PALE_ORANGE, "#EDEFF2", GREY_INK


def product_weights(config: LlamaConfig) -> int:
    """Count the weights that multiply each token: all matrices, the embedding not.

    The head counts, also when it is the embedding's matrix.
    """
    c = config
    attention = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    block = c.embed_dim * (attention + 3 * c.ffn_dim)
    return c.num_layers * block + c.vocab_size * c.embed_dim


def call_flops(config: LlamaConfig, num_tokens: int, num_cached: int = 0) -> int:
    """Count the operations of one call's matrix products; a multiply-add is two."""
    weights = 2 * product_weights(config)
    per_key = 4 * config.num_layers * config.num_heads * config.head_dim
    return num_tokens * (weights + per_key * (num_cached + num_tokens))


class StaircaseData(NamedTuple):
    """For each step, how often it computed the key of each token."""

    words: tuple[str, ...]
    num_prompt: int
    without: Int[Tensor, "steps tokens"]
    with_cache: Int[Tensor, "steps tokens"]


def staircase_data(
    model: Llama, words: Sequence[str], num_prompt: int
) -> StaircaseData:
    """Watch the key projection of the first layer while a text grows.

    The words only label the tokens; the ids are their numbers, 0 1 2 ….
    """
    tokens = torch.arange(len(words))[None]
    lengths = range(num_prompt, len(words))
    without, with_cache = (
        torch.zeros(len(lengths), len(words), dtype=torch.int64) for _ in range(2)
    )
    cache = model.new_cache(1, len(words))
    for step, length in enumerate(lengths):
        _count_keys(model, tokens[:, :length], None, without[step])
        fresh = tokens[:, cached_length(cache) : length]
        _count_keys(model, fresh, cache, with_cache[step])
    return StaircaseData(tuple(words), num_prompt, without, with_cache)


def _count_keys(
    model: Llama, tokens: Tensor, cache: list[LayerCache] | None, counts: Tensor
) -> None:
    start = cached_length(cache)

    def count(_module: object, inputs: tuple[Tensor], _output: Tensor) -> None:
        counts[start : start + inputs[0].shape[1]] += 1

    hook = model.get_submodule("blocks.0.attention.k_proj").register_forward_hook(count)
    try:
        with torch.no_grad():
            model(tokens, cache)
    finally:
        hook.remove()


def draw_staircase(data: StaircaseData) -> BookFigure:
    """Draw the text as it is written, one row a step, twice."""
    figure, axes = panels(2, 1, height=6.4)
    seen = data.without.cumsum(0) > 1  # computed before, here or earlier
    again = int((data.without.bool() & seen).sum())
    fresh = int(data.without.sum()) - again
    _draw_steps(axes[0], data, data.without)
    axes[0].set_title("Without a cache: every step runs the whole text", loc="left")
    _key(
        axes[0], data, [(NEW, f"{fresh} computed"), (AGAIN, f"{again} computed again")]
    )
    _draw_steps(axes[1], data, data.with_cache)
    axes[1].set_title("With a cache: every step runs what is new", loc="left")
    computed = int(data.with_cache.sum())
    read = int(data.without.sum()) - computed
    _key(axes[1], data, [(NEW, f"{computed} computed"), (READ, f"{read} read back")])
    return figure


def _draw_steps(ax: Axes, data: StaircaseData, counts: Tensor) -> None:
    steps, columns = counts.shape
    before = torch.zeros(columns, dtype=torch.int64)
    for step in range(steps):
        drawn = data.num_prompt + step
        for column in range(drawn):
            new = bool(counts[step, column]) and not bool(before[column])
            fill = NEW if new else AGAIN if counts[step, column] else READ
            ink = "white" if new else INK if counts[step, column] else READ_INK
            _cell(ax, step, column, data.words[column], fill, ink)
        _cell(ax, step, drawn, data.words[drawn], "none", INK, drawn=True)
        before += counts[step]
    ax.set(xlim=(-0.06, columns), ylim=(steps, -0.1), xticks=[])
    names = ["prefill", *["decode"] * (steps - 1)]
    plain = [f"step {step + 1}" for step in range(steps)]
    cached = int(counts[-1].sum()) == 1
    ax.set_yticks([s + 0.5 for s in range(steps)], names if cached else plain)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _cell(
    ax: Axes,
    step: int,
    column: int,
    word: str,
    fill: str,
    ink: str,
    drawn: bool = False,
) -> None:
    box = Rectangle(
        (column + 0.03, step + 0.06),
        0.94,
        0.88,
        facecolor=fill,
        edgecolor=INK if drawn else "none",
        linestyle=(0, (2, 2)) if drawn else "-",
        linewidth=1,
    )
    ax.add_patch(box)
    ax.text(column + 0.5, step + 0.53, word, color=ink, ha="center", va="center")


def _key(ax: Axes, data: StaircaseData, rows: list[tuple[str, str]]) -> None:
    """Say in the empty corner what the colours mean, and how many there are."""
    left = len(data.words) - 4.4
    for i, (fill, words) in enumerate([*rows, ("none", "drawn at this step")]):
        box = Rectangle(
            (left, 0.2 + 0.95 * i),
            0.45,
            0.6,
            facecolor=fill,
            edgecolor=INK if fill == "none" else "none",
            linestyle=(0, (2, 2)),
        )
        ax.add_patch(box)
        ax.text(left + 0.62, 0.52 + 0.95 * i, words, va="center")


class CostData(NamedTuple):
    """Operations to write a text of each length, from its first token."""

    lengths: Int[Tensor, "points"]
    without: Float[Tensor, "points"]
    with_cache: Float[Tensor, "points"]


def cost_data(config: LlamaConfig) -> CostData:
    """Add up the calls, for every length that the model was made for."""
    lengths = torch.arange(1, config.max_seq_len + 1)
    without = [call_flops(config, s) for s in lengths.tolist()]
    with_cache = [call_flops(config, 1, s - 1) for s in lengths.tolist()]
    totals = (
        torch.tensor(costs, dtype=torch.float64).cumsum(0)
        for costs in (without, with_cache)
    )
    return CostData(lengths, *totals)


def draw_cost(data: CostData, mark: int = 1000) -> BookFigure:
    """Draw both totals, and measure the gap at one length."""
    figure, (ax,) = panels(height=4.2)
    lengths = data.lengths.numpy()
    without, with_cache = data.without.numpy(), data.with_cache.numpy()
    ax.fill_between(lengths, with_cache, without, color=ORANGE, alpha=0.10, lw=0)
    ax.loglog(lengths, without, color=ORANGE, lw=2.5)
    ax.loglog(lengths, with_cache, color=BLUE, lw=2.5)
    low, high = with_cache[mark - 1], without[mark - 1]
    ends = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0, "lw": 1.5}
    ax.annotate("", (mark, high), (mark, low), arrowprops=ends)
    gap = f"{high / low:.0f} times"
    ax.text(mark * 1.1, (low * high) ** 0.5, gap, ha="left", va="center", size=14)
    for costs, name, colour, x, shift, side in (
        (without, "without a cache", ORANGE, 50, 1.8, "right"),
        (with_cache, "with a cache", BLUE, 36, 1 / 1.8, "left"),
    ):
        factor = costs[2 * x - 1] / costs[x - 1]
        words = f"{name}:\ntwice the text, {factor:.0f} times the work"
        up = "bottom" if shift > 1 else "top"
        y = costs[x - 1] * shift
        ax.text(x, y, words, color=colour, ha=side, va=up)
    ax.set_xlabel("tokens in the text")
    ax.set_xticks([1, 10, 100, 1000, 8192], ["1", "10", "100", "1,000", "8,192"])
    ax.minorticks_off()
    ax.set_xlim(1, lengths[-1])
    ax.set_title(
        "Multiplications and additions to write a text, SmolLM2-135M", loc="left"
    )
    return figure
