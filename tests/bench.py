"""Tokens a second of the real model on this machine: `make bench`. Not a test."""

import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from annotated_src import attention
from annotated_src.checkpoint import load_model
from annotated_src.weights import smollm2

PREFILL, DECODE, REPEATS = 512, 32, 5


def seconds(work: Callable[[], object]) -> float:
    """Median of some runs, after one to warm up."""
    work()
    runs = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


@torch.inference_mode()
def measure_ours(dtype: torch.dtype, attend: Callable) -> tuple[float, float]:
    """Milliseconds to prefill, and for one decoded token behind a prompt."""
    model = load_model(smollm2(), dtype)
    tokens = torch.arange(1000, 1000 + PREFILL)[None]

    def decode() -> None:
        for cache in caches:
            cache.length = PREFILL
        for i in range(DECODE):
            model(tokens[:, i : i + 1], caches)

    with mock.patch.object(attention, "attend", attend):
        prefill = seconds(lambda: model(tokens, model.new_cache(1, PREFILL)))
        caches = model.new_cache(1, PREFILL + DECODE)
        model(tokens, caches)
        return 1e3 * prefill, 1e3 * seconds(decode) / DECODE


@torch.inference_mode()
def measure_transformers(dtype: torch.dtype) -> tuple[float, float]:
    """The same for transformers, with its default attention and growing cache."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype)
    tokens = torch.arange(1000, 1000 + PREFILL)[None]
    prefill = seconds(lambda: model(tokens, use_cache=True))

    def decode() -> None:
        for i in range(DECODE):
            model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache.crop(-DECODE)

    cache = model(tokens, use_cache=True).past_key_values
    return 1e3 * prefill, 1e3 * seconds(decode) / DECODE


def main() -> None:
    """Print one row per way of computing."""
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", os.cpu_count() or 1)))
    print(f"SmolLM2-135M, {torch.get_num_threads()} threads")
    print(f"{'':34}{f'prefill {PREFILL}, ms':>16}{'decode, ms a token':>20}")
    for dtype in (torch.float32, torch.bfloat16):
        rows = {
            "annotated, attend": lambda d=dtype: measure_ours(d, attention.attend),
            "annotated, attend_fused": lambda d=dtype: measure_ours(
                d, attention.attend_fused
            ),
            "transformers": lambda d=dtype: measure_transformers(d),
        }
        for name, row in rows.items():
            prefill, decode = row()
            print(f"{name + ', ' + str(dtype)[6:]:34}{prefill:16.0f}{decode:20.1f}")


if __name__ == "__main__":
    main()
