"""Numbers of a moving figure: who reads which KV head, and what a token costs."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from annotated_src.attention import repeat_kv
from annotated_src.figures.heads import MODELS
from annotated_src.kv_cache import new_caches

NUM_HEADS = 8  # those of one model that fit on a phone
KV_HEADS = (8, 4, 2, 1)
SHOWN = ("Llama-2-7B", "Llama-3-8B", "TinyLlama-1.1B", "Llama-2-70B")


def gqa_groups_data() -> dict[str, Any]:
    """Wire 8 query heads to 8, 4, 2 and 1; weigh models that share as much.

    Lists go by KV_HEADS. `tiled` is how the mistake, `repeat`, would wire them.
    """
    reads, tiled = [], []
    for kv_heads in KV_HEADS:
        x = torch.arange(kv_heads).view(1, kv_heads, 1, 1).float()
        group = NUM_HEADS // kv_heads
        reads.append(_whole(repeat_kv(x, group)))
        tiled.append(_whole(x.repeat(1, group, 1, 1)))
    return {
        "kv_heads": list(KV_HEADS),
        "reads": reads,
        "tiled": tiled,
        "models": {name: _model(name) for name in SHOWN},
    }


def _whole(x: Tensor) -> list[int]:
    return [int(number) for number in x.flatten()]


def _model(name: str) -> dict[str, Any]:
    """Ask for caches in float16: of one token, and of 4,096."""
    config = MODELS[name]
    nothing = torch.empty(0, dtype=torch.float16, device="meta")
    sizes = [
        replace(config, num_kv_heads=config.num_heads * kv_heads // NUM_HEADS)
        for kv_heads in KV_HEADS
    ]
    token, text = (
        [sum(layer.num_bytes for layer in new_caches(c, 1, n, nothing)) for c in sizes]
        for n in (1, 4096)
    )
    return {
        "heads": config.num_heads,
        "built": config.num_kv_heads,
        "kv_heads": [c.num_kv_heads for c in sizes],
        "token_bytes": token,
        "text_bytes": text,
    }
