"""The files that the device's table measures: made once, kept under .build/bench."""

import hashlib
import json
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "attention",
    "convert",
    "edge_model",
    "feed_forward",
    "models/llama",
    "norms",
    "rotary",
)
CONVERTERS = ("torch", "litert-torch", "ai-edge-quantizer")
PREFILL, CACHE = 64, 256
SMALL = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "float32, keys repeated": {"change": "repeat"},
    "float32, index_copy": {"change": "index_copy"},
    "int8, cache 2048": {"quantize": "int8", "cache": 2048},
}
LARGE = {name: SMALL[name] for name in ("float32", "int8", "int8, cache 2048")}


def small_checkpoint(folder):
    """The Llama of the chapter on training, with weights at random."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    if not (folder / "config.json").exists():
        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fingerprint(job):
    """What an export depends on: what is asked for, our code, and the converter."""
    code = [(ROOT / f"annotated_src/{name}.py").read_bytes() for name in SOURCES]
    asked = job, PREFILL, CACHE, [version(name) for name in CONVERTERS]
    return hashlib.sha256(b"".join([*code, repr(asked).encode()])).hexdigest()


def exports(folder, directory, wanted, run):
    """Return {name: {"path", "seconds", "peak", "bytes"}}, making what is not there.

    run lets a process of its own do it, so that its peak of memory is the export's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, options in wanted.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '_')}.tflite"
        about = path.with_suffix(".json")
        known = json.loads(about.read_text("utf-8")) if about.exists() else {}
        job = {"directory": str(directory), "path": str(path)} | options
        key = fingerprint(job)
        if known.get("fingerprint") != key or not path.exists():
            about.unlink(missing_ok=True)
            known = run("edge export", job) | {"fingerprint": key}
            about.write_text(json.dumps(known), "utf-8")
        found[name] = known
    return found


def by_index_copy(cache, keys, values):
    """FunctionalCache.append as one would write it without a thought of the device."""
    at = cache.start + torch.arange(keys.shape[2], dtype=cache.start.dtype)
    cache.keys = cache.keys.index_copy(2, at, keys)
    cache.values = cache.values.index_copy(2, at, values)
    return cache.keys, cache.values


def changed(what):
    """Switch off one of the exporter's two ideas."""
    from annotated_src import edge_model
    from annotated_src.attention import attend

    if what == "repeat":
        return patch.object(edge_model, "attend_folded", attend)
    if what == "index_copy":
        return patch.object(edge_model.FunctionalCache, "append", by_index_copy)
    return nullcontext()


def export(job):
    """Make one file; say how long it took, and the memory at its highest."""
    from annotated_src.checkpoint import load_model
    from annotated_src.export import export_tflite
    from tests.bench.worker import memory

    model, path = load_model(job["directory"]), Path(job["path"])
    start = time.perf_counter()
    with changed(job.get("change")):
        export_tflite(
            model,
            path,
            prefill=job.get("prefill", PREFILL),
            cache=job.get("cache", CACHE),
            quantize=job.get("quantize"),
            force=True,
        )
    seconds = time.perf_counter() - start
    return {
        "path": str(path),
        "seconds": seconds,
        "peak": memory("VmHWM"),
        "bytes": path.stat().st_size,
    }
