"""Export a model for a device: one .tflite file with two entries, prefill and decode.

python -m annotated_src.export MODEL_DIR out.tflite --quantize int8
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from annotated_src.checkpoint import load_model
from annotated_src.convert import (
    STORED,
    check_scheme,
    convert,
    load_litert,
    quantize_file,
)
from annotated_src.edge import EdgeRunner, edge_generate
from annotated_src.edge_model import make_entries

__all__ = ["edge_generate", "export_tflite"]
PREFILL, CACHE = 64, 256
CLOSE = 1e-3  # of the largest score; measured are some 1e-6


def export_tflite(
    model: nn.Module,
    path: Path | str,
    prefill: int = PREFILL,
    cache: int = CACHE,
    quantize: str | None = None,
    match: str = ".*",
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a Llama, Gemma or Phi so that it runs without torch: see `EdgeRunner`.

    prefill is the most tokens of a prompt, cache of prompt and answer together.
    quantize is "int8", "int4" (in groups of 32; with both, activations become int8 as
    it runs), "int8-weight-only", "fp16", or None. match restricts it to operators whose
    name in the file fits. Before each stage progress(stage) is called.

    Raises:
        ImportError: the edge extra is not installed.
        RuntimeError: the file's scores are not the model's (a fault of the converter).
        ValueError: path is taken or no place for a file; `EdgeModel` refuses the model
            or the sizes; the scheme is unknown, or changes no weight.
    """
    path, say = Path(path), progress or (lambda stage: None)
    _check_target(path, force)
    check_scheme(quantize, match)
    entries = make_entries(model, prefill, cache)
    say("loading litert")
    load_litert()
    with TemporaryDirectory(prefix=".exporting-", dir=path.parent) as aside:
        written = Path(aside) / "float32.tflite"
        say("converting")
        convert(entries, written)
        say("comparing")
        _compare(model, written)
        if quantize is not None:
            say(f"quantizing: {quantize}")
            quantize_file(written, written, quantize, match)
        _check_target(path, force)  # minutes later
        written.replace(path)


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected a file")
    if path.exists() and not force:
        raise ValueError(f"{path} exists; force (--force) replaces it")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory")


def _compare(model: nn.Module, written: Path) -> None:
    runner = EdgeRunner(written)
    prompt = torch.arange(min(runner.prefill_len, 8)) % runner.vocab_size
    there = torch.from_numpy(runner.read(prompt.tolist()))
    with torch.no_grad():
        here = model(prompt[None], last_logits_only=True)[0, 0]
    gap, scale = float((here - there).abs().max()), float(here.abs().max())
    if not gap <= CLOSE * max(scale, 1.0):
        raise RuntimeError(f"the converted model's scores are off by {gap:.3g}")


def make_parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_src.export",
        description="Write the model in the directory MODEL_DIR to a .tflite file with "
        "two entries, prefill and decode, that runs without torch.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("file", metavar="out.tflite", type=Path)
    parser.add_argument("--quantize", choices=STORED, help="fewer bits for the weights")
    parser.add_argument("--match", default=".*", help="only operators of such a name")
    parser.add_argument(
        "--prefill", type=int, default=PREFILL, help="the most tokens of a prompt"
    )
    parser.add_argument(
        "--cache", type=int, default=CACHE, help="... of prompt and answer together"
    )
    parser.add_argument("--force", action="store_true", help="replace the file")
    return parser


def main() -> None:
    """Run the command; an error is one line, and exit status 1."""
    parser = make_parser()
    asked = parser.parse_args()
    start = time.monotonic()

    def say(stage: str) -> None:
        if sys.stderr is not None:  # as where it is closed
            sys.stderr.write(f"{time.monotonic() - start:5.0f} s  {stage}\n")
            sys.stderr.flush()

    try:
        _check_target(asked.file, asked.force)  # before minutes are spent
        say(f"reading {asked.model_dir}")
        model = load_model(asked.model_dir)
        sizes = {"prefill": asked.prefill, "cache": asked.cache}
        options = {"quantize": asked.quantize, "match": asked.match}
        export_tflite(
            model, asked.file, **sizes, **options, force=asked.force, progress=say
        )
        say(f"wrote {asked.file}: {asked.file.stat().st_size / 1e6:.1f} MB")
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
