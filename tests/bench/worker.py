"""What a process of its own measures: `python -m tests.bench.worker JOB JSON`.

Threads are set from outside, by OMP_NUM_THREADS: one process, one number of threads.
"""

import json
import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from annotated_src.quiet import quietly
from tests.bench import contenders
from tests.bench.contenders import prompt

TORCH = (contenders.Plain, contenders.Fast, contenders.Transformers)


def measure(works, repeats):
    """Medians of works {name: function that returns ms}, in turns."""
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(work())
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(work):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


@torch.inference_mode()
def prefill_row(runners, batch_size, num_tokens, repeats, vocab_size=contenders.VOCAB):
    tokens = prompt(batch_size, num_tokens, vocab_size)

    def work(runner):
        runner.prefill(tokens[:, :8])  # to warm up, each time, as below
        return milliseconds(lambda: runner.prefill(tokens))

    return measure({r.name: lambda r=r: work(r) for r in runners}, repeats)


@torch.inference_mode()
def decode_row(
    runners, batch_size, context, steps, repeats, vocab_size=contenders.VOCAB
):
    tokens = prompt(batch_size, context, vocab_size)
    for runner in runners:
        runner.ready(batch_size, context, steps)

    def work(runner):
        # The one before has left its data in the processor's cache, and its threads.
        runner.decode(tokens, min(4, steps))
        return runner.decode(tokens, steps)

    return measure({r.name: lambda r=r: work(r) for r in runners}, repeats)


@torch.inference_mode()
def profile(runner, work, top=5):
    """Share of the time of each of the slowest operators: [(name, share)]."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quietly(), torch.profiler.profile(activities=activities) as found:
        work(runner)
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(e.key, e.self_cpu_time_total / total) for e in events[:top]]


def limits(megabytes=512, size=2048, repeats=15):
    """The machine's own: bytes a second from memory, multiply-adds a second."""
    numbers = torch.ones(megabytes << 18)  # of 4 bytes
    target = torch.empty_like(numbers)
    best = {"sum": 1e9, "copy": 1e9, "float32": 1e9, "bfloat16": 1e9}
    matrices = {
        d: torch.ones(size, size, dtype=getattr(torch, d)) for d in list(best)[2:]
    }
    for _ in range(repeats):
        works = {"sum": numbers.sum, "copy": lambda: target.copy_(numbers)}
        works |= {d: lambda m=m: F.linear(m, m) for d, m in matrices.items()}
        for name, work in works.items():
            best[name] = min(best[name], milliseconds(work))
    bandwidth = max(numbers.nbytes / best["sum"], 2 * numbers.nbytes / best["copy"])
    rates = {d: 1e3 * size**3 / best[d] for d in matrices}
    return {"bytes": 1e3 * bandwidth, **rates}


def table(job):
    """All rows for one number of threads, in turns: a dictionary for JSON."""
    threads, repeats = torch.get_num_threads(), job["repeats"]
    runners = [kind(job["directory"]) for kind in TORCH]
    for path in job["gguf"].values():
        runners.append(contenders.LlamaCpp(path, threads))
    rows, profiles = {}, {}
    steps, vocab_size = job["steps"], job["vocab_size"]

    def explain(name, work):
        """Profile a row in which the plain path is not ahead."""
        if rows[name]["plain"] >= rows[name]["transformers"]:
            both = [r for r in runners if r.name in ("plain", "transformers")]
            profiles[name] = {r.name: profile(r, work) for r in both}

    for batch_size in job["batches"]:
        name = f"prefill, {job['prefill']} tokens, batch {batch_size}"
        # The longest rows are measured less often.
        times = repeats if batch_size == 1 else max(1, repeats - 1)
        size = (batch_size, job["prefill"])
        rows[name] = prefill_row(runners, *size, times, vocab_size)
        tokens = prompt(*size, vocab_size)
        explain(name, lambda r, t=tokens: r.prefill(t))
    for batch_size in job["batches"]:
        for context in job["contexts"]:
            name = f"decode, context {context}, batch {batch_size}"
            size = (batch_size, context)
            rows[name] = decode_row(runners, *size, steps, repeats, vocab_size)
            tokens = prompt(*size, vocab_size)
            explain(name, lambda r, t=tokens: r.decode(t, 4))
    weight_bytes = {runner.name: runner.weight_bytes for runner in runners}
    return {
        "rows": rows,
        "profiles": profiles,
        "limits": limits(),
        "weight_bytes": weight_bytes,
    }


def load(job):
    """Load once: seconds and megabytes, until loaded and until the first logits."""
    kinds = {kind.name: kind for kind in TORCH}
    if job["name"] == "transformers":
        from transformers import DynamicCache, LlamaForCausalLM  # noqa: F401
    elif job["name"] in kinds:
        import annotated_src.fast  # noqa: F401
    else:
        import xllamacpp  # noqa: F401
    before = memory("VmRSS")
    start = time.perf_counter()
    if job["name"] in kinds:
        runner = kinds[job["name"]](job["directory"])
    else:
        runner = contenders.LlamaCpp(job["path"])
    loaded, peak = time.perf_counter() - start, memory("VmHWM") - before
    with torch.inference_mode():
        runner.first_logits(prompt(1, 8, job["vocab_size"]))
    return {
        "seconds": loaded,
        "peak": peak,
        "seconds to first logits": time.perf_counter() - start,
        "peak to first logits": memory("VmHWM") - before,
    }


def gpu_table(job):
    from tests.bench import gpu

    return gpu.table(job)


def edge(name):
    def work(job):
        from tests.bench import edge, edge_exports

        works = (edge.table, edge.quality, edge_exports.export)
        return {work.__name__: work for work in works}[name](job)

    return work


def memory(field):
    """Megabytes of this process: VmRSS now, VmHWM at its highest (Linux)."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


def main():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = json.loads(sys.argv[2])
    works = {"table": table, "load": load, "gpu": gpu_table}
    works |= {f"edge {name}": edge(name) for name in ("table", "quality", "export")}
    found = works[sys.argv[1]](job)
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's threads need not be waited for


if __name__ == "__main__":
    main()
