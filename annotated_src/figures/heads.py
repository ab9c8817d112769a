"""Pictures of shared heads: who reads whom, what a cache weighs, what a step moves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from annotated_src.attention import repeat_kv
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    CYCLE,
    GREY_INK,
    INK,
    ORANGE,
    SIZE,
    SKY,
    BookFigure,
    ink_on,
    panels,
)
from annotated_src.masks import causal_mask
from annotated_src.models.llama import Llama, LlamaConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MIB, GIB = 2**20, 2**30


def _sizes(
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    heads: tuple[int, int],
    ffn_dim: int,
    max_seq_len: int,
    rope_base: float = 10_000.0,
    tied_head: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=embed_dim // heads[0],
        ffn_dim=ffn_dim,
        max_seq_len=max_seq_len,
        norm_eps=1e-5,
        rope_base=rope_base,
        tied_head=tied_head,
    )


MODELS = {
    "Llama-2-7B": _sizes(32_000, 32, 4096, (32, 32), 11_008, 4096),
    "Llama-2-70B": _sizes(32_000, 80, 8192, (64, 8), 28_672, 4096),
    "Llama-3-8B": _sizes(128_256, 32, 4096, (32, 8), 14_336, 8192, 500_000.0),
    "TinyLlama-1.1B": _sizes(32_000, 22, 2048, (32, 4), 5632, 2048),
    "SmolLM2-135M": _sizes(49_152, 30, 576, (9, 3), 1536, 8192, 100_000.0, True),
    "ChatGLM-6B": _sizes(130_528, 28, 4096, (32, 32), 16_384, 2048),
    "ChatGLM2-6B": _sizes(65_024, 28, 4096, (32, 2), 13_696, 32_768),
}
"""Sizes of real models. The last two are no Llamas; their caches could be one's."""


def weightless(config: LlamaConfig, dtype: torch.dtype = torch.float16) -> Llama:
    """Build a Llama of any size that has shapes and dtypes, and no numbers."""
    with torch.device("meta"):
        return Llama(config).to(dtype)


class SharingData(NamedTuple):
    """Which KV head each query head reads, and the caches of MODELS in bytes."""

    wiring: dict[str, Int[Tensor, "N"]]
    cache: dict[str, int]
    unshared: dict[str, int]  # if every query head had its own KV head
    num_tokens: int


def sharing_data(num_tokens: int = 4096, num_heads: int = 6) -> SharingData:
    """Wire three small layers, and ask every model for a cache in float16."""
    wiring = {}
    for name, num_kv_heads in (
        ("Multi-head", num_heads),
        ("Grouped-query", 2),
        ("Multi-query", 1),
    ):
        kv_heads = torch.arange(float(num_kv_heads)).view(1, num_kv_heads, 1, 1)
        read = repeat_kv(kv_heads, num_heads // num_kv_heads)
        wiring[name] = read.flatten().long()
    cache, unshared = {}, {}
    for name, config in MODELS.items():
        layers = weightless(config).new_cache(1, num_tokens)
        cache[name] = sum(layer.num_bytes for layer in layers)
        unshared[name] = cache[name] * config.num_heads // config.num_kv_heads
    return SharingData(wiring, cache, unshared, num_tokens)


def draw_sharing(data: SharingData) -> BookFigure:
    """Draw the wires of the three layers; below, each model's cache as a bar."""
    figure, (top, bottom) = panels(2, 1, height=5.7, height_ratios=[1.0, 2.0])
    for i, (name, reads) in enumerate(data.wiring.items()):
        _wires(top, 7.7 * i, reads.tolist(), name)
    top.text(-0.8, 2.0, "query\nheads", ha="right", va="center")
    top.text(-0.8, 0.0, "KV\nheads", ha="right", va="center")
    top.set(xlim=(-2.6, 21.1), ylim=(-0.6, 4.6))
    top.set_aspect("equal")
    top.axis("off")
    words = f"The KV cache of one text of {data.num_tokens:,} tokens"
    bottom.text(-1.79, -0.95, words, size=SIZE + 1, weight="bold")
    for row, name in enumerate(data.cache):
        _stripes(bottom, row + 0.35 * (row > 2) + 0.35 * (row > 4), name, data)
    bottom.set(xlim=(-1.8, 3.62), ylim=(7.3, -1.3), yticks=[])
    bottom.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2"])
    bottom.set_xlabel("GiB in float16; each stripe is a KV head", loc="right")
    bottom.spines["left"].set_visible(False)
    bottom.spines["bottom"].set_bounds(0, 2)
    return figure


def _wires(ax: Axes, left: float, reads: list[int], title: str) -> None:
    """Draw query heads as dots, KV heads as squares below, and who reads whom."""
    num_heads, num_kv_heads = len(reads), max(reads) + 1
    for kv in range(num_kv_heads):
        colour = CYCLE[kv]
        readers = [left + head for head in range(num_heads) if reads[head] == kv]
        middle = sum(readers) / len(readers)
        for x in readers:
            ax.plot([x, middle], [2, 0], color=colour, lw=2.2, zorder=1)
            ax.plot(x, 2, "o", ms=17, color=colour, mec="white", mew=1.5, zorder=2)
            _number(ax, x, 2.0, round(x - left), colour)
        square = {"ms": 17, "mec": "white", "mew": 1.5, "zorder": 2}
        ax.plot(middle, 0, "s", color=colour, **square)
        _number(ax, middle, 0.0, kv, colour)
    words = f"{title}\n{num_heads} on {num_kv_heads}"
    ax.text(left - 0.4, 2.95, words, size=SIZE + 1, weight="bold")


def _number(ax: Axes, x: float, y: float, number: int, colour: str) -> None:
    place = {"ha": "center", "va": "center_baseline", "zorder": 3}
    ax.text(x, y, str(number), color=ink_on(colour), weight="bold", **place)


def _stripes(ax: Axes, y: float, name: str, data: SharingData) -> None:
    """Draw a bar with one stripe per KV head, to scale, and say what it saves."""
    config = MODELS[name]
    total = data.cache[name] / GIB
    width = total / config.num_kv_heads
    for kv in range(config.num_kv_heads):
        colour = (BLUE, SKY)[kv % 2]
        corner = (kv * width, y - 0.36)
        ax.add_patch(
            Rectangle(corner, width, 0.72, facecolor=colour, edgecolor="white", lw=0.7)
        )
    heads = f"{config.num_heads} on {config.num_kv_heads}"
    ax.text(-1.79, y, name, va="center", weight="bold")
    ax.text(-0.05, y, heads, va="center", ha="right")
    words = _amount(data.cache[name])
    ax.text(total + 0.03, y, words, va="center", weight="bold")
    factor = config.num_heads // config.num_kv_heads
    if factor > 1:
        rest = f"unshared: {_amount(data.unshared[name])} ({factor}×)"
        ax.text(total + 0.72, y, rest, va="center", color=GREY_INK)


def _amount(num_bytes: int) -> str:
    if num_bytes < GIB:
        return f"{num_bytes / MIB:.0f} MiB"
    return f"{num_bytes / GIB:.3g} GiB"


class Moves(NamedTuple):
    """Bytes of keys and values that attention moved."""

    from_cache: int
    written: int
    from_copy: int


class _Ledger(TorchDispatchMode):
    """Note what each operation reads and writes; a view moves nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.floor = keys.nbytes  # queries, scores and results are smaller
        self.cache = {_storage(keys), _storage(values)}
        self.moved = {"from_cache": 0, "written": 0, "from_copy": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if _storage(result) in map(_storage, given):
            return result
        for x in given:
            if _distinct_bytes(x) >= self.floor:
                source = "from_cache" if _storage(x) in self.cache else "from_copy"
                self.moved[source] += _distinct_bytes(x)
        if result.nbytes >= self.floor:
            self.moved["written"] += result.nbytes
        return result


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _distinct_bytes(x: Tensor) -> int:
    """Count an element that several indices reach, along a stride of 0, once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def count_moves(
    attend: Attend, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Moves:
    """Run attention and count the bytes of keys and values read and written.

    Tensors smaller than the keys are left out; at decode these are all but copies of
    the keys and values. Works on meta tensors, and so at any size.
    """
    with torch.no_grad(), _Ledger(keys, values) as ledger:
        attend(queries, keys, values, mask)
    return Moves(**ledger.moved)


class TrafficData(NamedTuple):
    """What one decode step of one layer moves, for each way to compute it."""

    moves: dict[str, Moves]
    num_cached: int


def traffic_data(
    ways: Mapping[str, tuple[int, Attend]],
    num_heads: int = 32,
    head_dim: int = 128,
    num_cached: int = 4096,
) -> TrafficData:
    """Count each way, given with its number of KV heads, in float16."""
    moves = {}
    for name, (num_kv_heads, attend) in ways.items():
        queries, keys, values = (
            torch.empty(1, heads, length, head_dim, dtype=torch.float16, device="meta")
            for heads, length in (
                (num_heads, 1),
                (num_kv_heads, num_cached),
                (num_kv_heads, num_cached),
            )
        )
        mask = causal_mask(1, num_cached - 1, queries.device)
        moves[name] = count_moves(attend, queries, keys, values, mask)
    return TrafficData(moves, num_cached)


def draw_traffic(data: TrafficData) -> BookFigure:
    """Draw a bar for each way: read from the cache, copied, read again."""
    figure, (ax,) = panels(height=3.1)
    parts = (
        (BLUE, "white", "read from the cache"),
        (ORANGE, "white", "written as a copy"),
        (AMBER, INK, "read from the copy"),
    )
    for row, moves in enumerate(data.moves.values()):
        left = 0.0
        for (colour, ink, words), num_bytes in zip(parts, moves, strict=True):
            width = num_bytes / MIB
            ax.barh(row, width, 0.7, left, color=colour, edgecolor="white")
            if width > 40:
                x = left + width / 2
                ax.text(x, row, words, color=ink, ha="center", va="center")
            left += width
        ax.text(left + 1.5, row, f"{left:.0f} MiB", va="center", weight="bold")
    ax.set_yticks(range(len(data.moves)), list(data.moves))
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 163), ylim=(len(data.moves) - 0.5, -0.5))
    ax.set_xlabel("MiB moved for one token in one layer")
    return figure
