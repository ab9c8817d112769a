"""Numbers of a moving figure: what each step of writing computes, by counting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from annotated_src.generate import generate_stream
from annotated_src.kv_cache import cached_length
from annotated_src.models.llama import Llama, LlamaConfig

WORDS = (
    *("Once", "upon", "a", "time", "there", "was"),
    *("a", "llama", "who", "hums", "all", "day"),
)
NUM_PROMPT = 4
SIZES = LlamaConfig(97, 3, 20, 6, 2, 8, 36, 64, 1e-5, 10_000.0)


def kv_cache_data() -> dict[str, Any]:
    """Write the words twice with a small Llama: by `generate`, and without a cache.

    The words only label the tokens. `computed` is the number of tokens that a step
    sends through each layer, `read` how many the cache held before; `operations` are
    those of all matrix products, a multiply-add being two.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Llama(SIZES).double()
    prompt = torch.arange(NUM_PROMPT)[None]
    steps = len(WORDS) - NUM_PROMPT
    with_cache, text = [], prompt
    stream = generate_stream(model, prompt, max_new_tokens=steps)
    for _ in range(steps):
        with _count(model) as counted:
            token = next(stream)
        with_cache.append(counted)
        text = torch.cat([text, token[:, None]], dim=1)
    without = []
    for length in range(NUM_PROMPT, len(WORDS)):
        with torch.no_grad(), _count(model) as counted:
            model(text[:, :length], last_logits_only=True)
        without.append(counted)
    layer = model.new_cache(1, len(WORDS))[0]
    return {
        "words": list(WORDS),
        "prompt": NUM_PROMPT,
        "layers": SIZES.num_layers,
        "token_bytes": SIZES.num_layers * layer.num_bytes // len(WORDS),
        "with_cache": _columns(with_cache),
        "without": _columns(without),
    }


@contextmanager
def _count(model: Llama) -> Iterator[dict[str, int]]:
    """Note what enters the layers while the model runs once."""
    calls: list[tuple[int, int]] = []

    def watch(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, _rotate, _mask, cache = inputs
        held = 0 if cache is None else cached_length([cache])
        calls.append((x.shape[1], held))

    hooks = [block.register_forward_pre_hook(watch) for block in model.blocks]
    counted: dict[str, int] = {}
    try:
        # The counter does not know the fused kernel's products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counted
    finally:
        for hook in hooks:
            hook.remove()
    rows = {rows for rows, _ in calls}
    held = {held for _, held in calls}
    if len(calls) != len(model.blocks) or len(rows) > 1 or len(held) > 1:
        raise ValueError(f"the layers did not run once and alike: {calls}")
    counted |= {
        "computed": rows.pop(),
        "read": held.pop(),
        "operations": counter.get_total_flops(),
    }


def _columns(steps: list[dict[str, int]]) -> dict[str, list[int]]:
    return {name: [step[name] for step in steps] for name in steps[0]}
