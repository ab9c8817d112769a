"""Pictures of prefill and decode: operations, bytes, and the one over the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from annotated_src.figures.cache import product_weights
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    INK,
    ORANGE,
    PALE_BLUE,
    BookFigure,
    panels,
)
from annotated_src.kv_cache import LayerCache
from annotated_src.models.llama import Llama, LlamaConfig

PALE = PALE_BLUE


def call_flops(
    config: LlamaConfig,
    num_tokens: int,
    num_cached: int = 0,
    batch_size: int = 1,
    num_logits: int = 1,
) -> int:
    """Count the operations of one call's matrix products; a multiply-add is two.

    num_logits is for how many tokens of a row the head is asked.
    """
    head = config.vocab_size * config.embed_dim
    blocks = product_weights(config) - head
    per_key = 4 * config.num_layers * config.num_heads * config.head_dim
    keys = num_cached + num_tokens
    tokens = num_tokens * (2 * blocks + per_key * keys)
    return batch_size * (tokens + 2 * head * num_logits)


def counted_flops(run: Callable[[], object]) -> int:
    """Count the operations of the matrix products that really run.

    PyTorch's counter knows no fused attention on a CPU, so attention is spelled out.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def call_bytes(
    config: LlamaConfig,
    num_tokens: int,
    num_cached: int = 0,
    batch_size: int = 1,
    width: int = 4,
) -> int:
    """Count the bytes of weights and cache that one call must read, each once.

    width is the bytes of one number; norm gains and rows looked up are left out.
    """
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    kept = batch_size * per_token * (num_cached + num_tokens)
    return width * (product_weights(config) + kept)


class BytesRead(TorchDispatchMode):
    """Watch calls on a CPU: which bytes of weights and cache do their products read?

    A copy counts as reading; a byte that is read twice counts once.
    """

    READERS = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            "mm",
            "bmm",
            "addmm",
            "clone",
            "_to_copy",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
    )

    def __init__(self, model: Llama, cache: Sequence[LayerCache]) -> None:
        super().__init__()
        kept: list[Tensor] = list(model.parameters())
        kept += [tensor for layer in cache for tensor in (layer.keys, layer.values)]
        self.read = {tensor.untyped_storage().data_ptr(): 0 for tensor in kept}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in self.READERS:
            for tensor in args:
                self._note(tensor)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: object) -> None:
        if isinstance(tensor, Tensor):
            address = tensor.untyped_storage().data_ptr()
            if address in self.read:
                sizes = zip(tensor.shape, tensor.stride(), strict=True)
                # A stride of 0 shows the same numbers again.
                numbers = math.prod(size for size, stride in sizes if stride)
                seen = numbers * tensor.itemsize
                self.read[address] = max(self.read[address], seen)

    @property
    def total(self) -> int:
        """The bytes read so far."""
        return sum(self.read.values())


class AnswerData(NamedTuple):
    """What each call of one answer computes and reads; the first is the prefill."""

    num_prompt: int
    flops: Float[Tensor, "calls"]
    bytes_read: Float[Tensor, "calls"]


def answer_data(config: LlamaConfig, num_prompt: int, num_new: int) -> AnswerData:
    """Count each of the num_new calls that write an answer."""
    calls = [
        (num_prompt, 0),
        *((1, s) for s in range(num_prompt, num_prompt + num_new - 1)),
    ]
    flops = [call_flops(config, *call) for call in calls]
    read = [call_bytes(config, *call) for call in calls]
    return AnswerData(
        num_prompt,
        torch.tensor(flops, dtype=torch.float64),
        torch.tensor(read, dtype=torch.float64),
    )


def draw_answer(data: AnswerData) -> BookFigure:
    """Draw one bar a call, twice: what it computes, and what it reads."""
    figure, (work, traffic) = panels(2, 1, height=5.6, sharex=True)
    for ax, heights, unit in ((work, data.flops, 1e9), (traffic, data.bytes_read, 1e6)):
        colours = [AMBER, *[BLUE] * (len(heights) - 1)]
        ax.bar(
            range(1, len(heights) + 1),
            (heights / unit).numpy(),
            color=colours,
            width=0.82,
        )
        ax.set_xlim(0.2, len(heights) + 0.8)
    calls = len(data.flops)
    first = [float(x[0] / x.sum()) for x in (data.flops, data.bytes_read)]
    each = data.flops[1:].mean() / 1e9
    work.set_title("Billions of operations, call by call", loc="left")
    words = f"prefill, {data.num_prompt} tokens at once:\n{first[0]:.0%} of the work"
    top = float(data.flops[0]) / 1e9
    work.text(3, top * 0.93, words, color=ORANGE, va="top")
    words = f"decode, {calls - 1} calls of one token: {each:.1f} each"
    work.text(calls, top * 0.06, words, color=BLUE, ha="right", va="bottom")
    traffic.set_title("Megabytes of weights and cache read, call by call", loc="left")
    height = float(data.bytes_read.max()) / 1e6
    traffic.set_ylim(0, height * 1.38)
    words = f"prefill: {first[1]:.1%}"
    traffic.text(0.6, height * 1.08, words, color=ORANGE, va="bottom")
    words = f"decode: {1 - first[1]:.1%} of the traffic"
    traffic.text(calls, height * 1.08, words, color=BLUE, ha="right", va="bottom")
    ticks = [1, *range(16, calls + 1, 16)]
    traffic.set_xticks(ticks, [str(tick) for tick in ticks])
    traffic.set_xlabel("call, one for each new token")
    return figure


class TokenCostData(NamedTuple):
    """Operations of the step that makes the next token, by the text's length."""

    lengths: Int[Tensor, "lengths"]
    without: Float[Tensor, "lengths"]
    blocks: float
    head: float
    attention: Float[Tensor, "lengths"]  # of the step with a cache

    @property
    def with_cache(self) -> Float[Tensor, "lengths"]:
        """The whole step with a cache."""
        return self.blocks + self.head + self.attention


def token_cost_data(config: LlamaConfig) -> TokenCostData:
    """Count the next token's step for every length that the model was made for."""
    lengths = torch.arange(1, config.max_seq_len + 1)
    without = [call_flops(config, s) for s in lengths.tolist()]
    head = 2 * config.vocab_size * config.embed_dim
    blocks = 2 * product_weights(config) - head
    per_key = call_flops(config, 1, 1) - call_flops(config, 1)
    return TokenCostData(
        lengths,
        torch.tensor(without, dtype=torch.float64),
        float(blocks),
        float(head),
        lengths.double() * per_key,
    )


def draw_token_cost(data: TokenCostData, mark: int = 1000) -> BookFigure:
    """Draw the next token's cost: against re-reading, and what it consists of."""
    figure, (both, parts) = panels(2, 1, height=7.2)
    lengths, stacked = data.lengths.numpy(), data.with_cache.numpy()
    both.loglog(lengths, data.without.numpy(), color=ORANGE, lw=2.5)
    both.loglog(lengths, stacked, color=BLUE, lw=2.5)
    low, high = stacked[mark - 1], float(data.without[mark - 1])
    ends = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0, "lw": 1.5}
    both.annotate("", (mark, high), (mark, low), arrowprops=ends)
    gap = f"{high / low:.0f} times"
    both.text(mark * 1.12, (low * high) ** 0.5, gap, va="center", size=14)
    both.text(60, 7e10, "without a cache", color=ORANGE, ha="right")
    both.text(40, stacked[39] / 1.4, "with a cache", color=BLUE, va="top")
    both.set_ylim(7e7, 2e13)
    both.set_xticks([1, 10, 100, 1000, 8192], ["1", "10", "100", "1,000", "8,192"])
    both.minorticks_off()
    both.set_xlim(1, lengths[-1])
    both.set_title("Operations for the next token, SmolLM2-135M", loc="left")
    _stack(parts, data)
    return figure


def _stack(ax: Axes, data: TokenCostData) -> None:
    """Draw what one step with a cache consists of, on plain axes."""
    lengths = data.lengths.numpy()
    floor, head = data.blocks / 1e6, (data.blocks + data.head) / 1e6
    top = data.with_cache.numpy() / 1e6
    ax.fill_between(lengths, 0, floor, color=BLUE, lw=0)
    ax.fill_between(lengths, floor, head, color=PALE, lw=0)
    ax.fill_between(lengths, head, top, color=AMBER, lw=0)
    ax.set(xlim=(0, lengths[-1]), ylim=(0, top[-1] * 1.04))
    x = lengths[-1] * 0.98
    places = ((floor / 2, "blocks", "white"), ((floor + head) / 2, "head", INK))
    for y, name, ink in places:
        ax.text(x, y, name, color=ink, ha="right", va="center")
    ax.text(x, top[-1] * 0.56, "attention", ha="right", va="center")
    equal = int((data.attention <= data.blocks + data.head).sum()) + 1
    ax.plot([equal, equal], [0, 2 * head], color=INK, lw=1.2, ls="--")
    words = f"from {equal:,} keys on,\nattention is more than half"
    ax.text(equal * 0.97, 2.05 * head, words, ha="right", va="bottom")
    ax.set_xticks(
        [0, 2000, 4000, 6000, 8000], ["0", "2,000", "4,000", "6,000", "8,000"]
    )
    ax.set_xlabel("tokens in the text")
    ax.set_title("The lower curve again, in millions, on plain axes", loc="left")


class IntensityData(NamedTuple):
    """Operations for each byte read, as a call takes in more at once."""

    counts: Int[Tensor, "counts"]
    prefill: Float[Tensor, "counts"]  # counts tokens of one row, nothing cached
    contexts: tuple[int, ...]
    decode: Float[Tensor, "contexts counts"]  # one token of each of counts rows


def intensity_data(
    config: LlamaConfig, contexts: Sequence[int], most: int = 4096
) -> IntensityData:
    """Divide operations by bytes: longer prompts, or more rows that decode together.

    contexts are the tokens that each row attends to, the new one included.
    """
    counts = 2 ** torch.arange(round(math.log2(most)) + 1)
    prefill = [call_flops(config, n) / call_bytes(config, n) for n in counts.tolist()]
    decode = [
        [
            call_flops(config, 1, s - 1, n) / call_bytes(config, 1, s - 1, n)
            for n in counts.tolist()
        ]
        for s in contexts
    ]
    return IntensityData(
        counts,
        torch.tensor(prefill, dtype=torch.float64),
        tuple(contexts),
        torch.tensor(decode, dtype=torch.float64),
    )


def draw_intensity(data: IntensityData) -> BookFigure:
    """Draw how prefill climbs on, and how decode comes to a ceiling."""
    figure, (ax,) = panels(height=4.8)
    counts = data.counts.numpy()
    ax.loglog(counts, data.prefill.numpy(), color=ORANGE, lw=3)
    spot = len(counts) - 4
    at = (counts[spot] / 1.25, float(data.prefill[spot]) * 1.1)
    words = "prefill: tokens\nof one prompt"
    ax.text(*at, words, color=ORANGE, ha="right", va="bottom")
    dashes = ("-", (0, (6, 1)), (0, (3, 1)), (0, (1, 1)))
    for row, context, dash in zip(data.decode, data.contexts, dashes, strict=False):
        ax.loglog(counts, row.numpy(), color=BLUE, lw=2.5, ls=dash)
        at = (counts[-1], float(row[-1]) / 1.45)
        words = f"decode: rows of {context:,} tokens"
        ax.text(*at, words, color=BLUE, ha="right", va="top")
    ax.set_xlim(1, counts[-1])
    ax.set_ylim(0.3, 3000)
    ax.set_yticks([0.5, 5, 50, 500], ["0.5", "5", "50", "500"])
    ax.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
    ax.minorticks_off()
    ax.set_xlabel("tokens that one call takes in")
    ax.set_title("Operations for each byte read, SmolLM2-135M in float32", loc="left")
    return figure
