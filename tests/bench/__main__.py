"""`make bench`: the real model, ours and theirs, on this machine. Not a test.

Prints the tables; with WRITE_SPEED=1 it writes them into book/speed.md too. With --edge
it measures exported files instead, and the page is book/speed_device.md.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from annotated_src.convert import NEEDED
from tests.bench import report

ROOT = Path(__file__).resolve().parents[2]
THREADS, LOADS = (1, 2), 3


def run(work, job, threads=1):
    """Let a process of its own do the work, with so many threads; return its answer."""
    counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL")}
    found = subprocess.run(
        [sys.executable, "-m", "tests.bench.worker", work, json.dumps(job)],
        env=os.environ | counts | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(found.stdout.splitlines()[-1])


def say(line):
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def find_gguf():
    """The files for llama.cpp; without it, none, and the tables have no such column."""
    if importlib.util.find_spec("xllamacpp") is None:
        say("xllamacpp is not installed: no llama.cpp (pip install '.[bench]')")
        return {}
    from tests.bench.gguf_files import gguf_files

    return {name: str(path) for name, path in gguf_files(ROOT / ".build/bench").items()}


def measure_loading(job):
    """Medians of some loads each, in turns, every one in a fresh process."""
    names = {name: {} for name in ("transformers", "plain", "fast")}
    names |= {f"llama.cpp {kind}": {"path": p} for kind, p in job["gguf"].items()}
    found = {name: [] for name in names}
    for _ in range(LOADS):
        for name, more in names.items():
            found[name].append(run("load", job | {"name": name} | more))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def main():
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--quick", action="store_true", help="few steps: a rehearsal")
    parser.add_argument("--edge", action="store_true", help="the device's tables")
    options = parser.parse_args()
    if options.edge:
        from tests.bench import edge

        if importlib.util.find_spec("litert_torch") is None:
            parser.exit(1, f"--edge: {NEEDED}\n")
        text, page = edge.main(run, say, options, ROOT / ".build/bench/edge"), "_device"
    else:
        text, page = measure(options), ""
    sys.stdout.write(text)
    if os.environ.get("WRITE_SPEED"):
        report.put_into(ROOT / "book" / f"speed{page}.md", text)


def measure(options):
    """The tables of book/speed.md."""
    from annotated_src.weights import smollm2

    job = {
        "directory": str(smollm2()),
        "gguf": find_gguf(),
        "repeats": options.repeats,
        "prefill": 64 if options.quick else 512,
        "contexts": [64] if options.quick else [128, 1024],
        "batches": [1, 4],
        "steps": 4 if options.quick else 64,
        "vocab_size": 49152,
    }
    tables = {}
    for threads in options.threads:
        say(f"prefill and decode, {threads} thread{'s' * (threads > 1)}")
        tables[threads] = run("table", job, threads)
    say("loading")
    loading = measure_loading(job)
    text = report.write(tables, loading, job)
    say("a GPU, if there is one")
    return text + run("gpu", job)["text"]


if __name__ == "__main__":
    main()
