"""The device's tables: `python -m tests.bench --edge`. See book/speed_device.md."""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from annotated_src.tflite_file import operators
from tests.bench import contenders, edge_contenders, worker
from tests.bench.edge_exports import CACHE, LARGE, PREFILL, SMALL, exports
from tests.bench.edge_exports import small_checkpoint as make_small
from tests.bench.edge_report import MORE

CONTEXT, QUALITY_TOKENS = 128, 192
HANDED = ("float32", "int8", "int8, cache 2048")
PROMPT = "The capital of France is"
TEXT = "import"  # of Python's own manual: pages that every Python carries


def main(run, say, options, folder):
    """Measure all of it, every number of threads in a process of its own."""
    from annotated_src.weights import smollm2
    from tests.bench import edge_report

    say("exports (minutes, the first time)")
    directories = {"small": make_small(folder / "small"), "SmolLM2": smollm2()}
    wanted = {"small": SMALL, "SmolLM2": LARGE}
    files = {
        model: exports(folder / model / "files", directories[model], wanted[model], run)
        for model in directories
    }
    job = {
        "repeats": options.repeats,
        "steps": {"small": 64, "SmolLM2": 4 if options.quick else 48},
        "directories": {model: str(path) for model, path in directories.items()},
        "files": files,
        "prefill": PREFILL,
        "cache": CACHE,
        "context": CONTEXT,
        "texts": texts(directories["SmolLM2"]),
    }
    tables = {}
    for threads in options.threads:
        say(f"device, {threads} thread{'s' * (threads > 1)}")
        tables[threads] = run("edge table", job, threads)
    say("how well the files do on real text")
    graded = run("edge quality", job)
    openings = {name: opening(files["SmolLM2"][name]["path"]) for name in LARGE}
    said = answer(directories["SmolLM2"], files["SmolLM2"]["int8"]["path"])
    return (
        edge_report.write(tables, files, graded, openings, job) + said + fresh_memory()
    )


def opening(path, times=3):
    """Median seconds and megabytes, each time in a process without torch."""
    call = [sys.executable, "-m", "tests.bench.edge_open", str(path)]
    found = []
    for _ in range(times):
        said = subprocess.run(call, capture_output=True, check=True).stdout
        found.append(json.loads(said.splitlines()[-1]))
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


@torch.inference_mode()
def table(job):
    """Every row for one number of threads."""
    threads, rows, about, ideas = torch.get_num_threads(), {}, {}, {}
    for model, directory in job["directories"].items():
        runners = make_runners(directory, job["files"][model], threads, job)
        vocab_size = runners[0].model.config.vocab_size
        sizes = (job["repeats"] * (MORE if model == "small" else 1), vocab_size)
        readers = [runner for runner in runners if hasattr(runner, "prefill")]
        rows[f"{model}: prefill, {job['prefill']} tokens"] = worker.prefill_row(
            readers, 1, job["prefill"], *sizes
        )
        size = (1, job["context"], job["steps"][model])
        rows[f"{model}: decode"] = worker.decode_row(runners, *size, *sizes)
        about[model] = {r.name: describe(r, job["files"][model], job) for r in runners}
        about[model] |= {"config": vars(runners[0].model.config)}
        del runners, readers
        ideas[model] = ablations(job, model, threads, *sizes)
    return {"rows": rows, "about": about, "ideas": ideas, "limits": worker.limits()}


def make_runners(directory, files, threads, job):
    """All who take part, and of each what a step reads."""
    plain = contenders.Plain(directory)
    runners = [
        plain,
        contenders.Fast(directory),
        contenders.Transformers(directory),
        edge_contenders.Eager(plain.model, job["cache"], job["prefill"]),
    ]
    for name, width in (("float32", 4), ("int8", 1)):
        path = files[name]["path"]
        runner = edge_contenders.Tflite(f".tflite {name}", path, threads, width)
        runners.append(runner)
    handed = ".tflite int8, cache handed over"
    runners.append(edge_contenders.Handed(handed, files["int8"]["path"], threads, 1))
    return runners


def ablations(job, model, threads, repeats, vocab_size):
    """A model's files, each without one of the ideas, and how it is run."""
    files = {name: file["path"] for name, file in job["files"][model].items()}
    kinds = [(edge_contenders.Tflite, name, name, path) for name, path in files.items()]
    for name in filter(files.__contains__, HANDED):
        kinds.append(
            (edge_contenders.Handed, f"{name}, handed over", name, files[name])
        )
    runners = [
        kind(name, path, threads, 1 if "int8" in file else 4)
        for kind, name, file, path in kinds
    ]
    times = worker.decode_row(
        runners, 1, job["context"], job["steps"][model], repeats, vocab_size
    )
    readers = [runner for runner in runners if hasattr(runner, "prefill")]
    first = worker.prefill_row(readers, 1, job["prefill"], repeats, vocab_size)
    counts = {name: len(operators(path)["decode"]) for name, path in files.items()}
    return {
        name: {
            "prefill": first.get(name),
            "decode": times[name],
            "operators": counts[file],
        }
        for _, name, file, _ in kinds
    }


def describe(runner, files, job):
    """Width of its weights, how often the cache moves, and the steps it is cut into."""
    if isinstance(runner, edge_contenders.Tflite | edge_contenders.Handed):
        file = "float32" if runner.weight_bytes == 4 else "int8"
        count = len(operators(files[file]["path"])["decode"])
        places = job["cache"]
    else:
        count = edge_contenders.dispatched(runner, job["context"])
        eager = isinstance(runner, edge_contenders.Eager)
        places = job["cache" if eager else "context"]
    return {
        "weight_bytes": runner.weight_bytes,
        "moved": places * getattr(runner, "cache_moves", 1),
        "operators": count,
    }


@torch.inference_mode()
def quality(job):
    """Teacher-forced on real text: agreement, KL and perplexity of each file."""
    from annotated_src.edge import EdgeRunner
    from annotated_src.grading import grade, text_perplexity

    model = contenders.Plain(job["directories"]["SmolLM2"]).model
    tokens = torch.tensor(job["texts"])
    expected = model(tokens)
    found = {}
    for name in ("float32", "int8"):
        runner = EdgeRunner(job["files"]["SmolLM2"][name]["path"])
        given = torch.stack(
            [torch.from_numpy(runner.logits(ids)) for ids in job["texts"]]
        )
        found[name] = grade(expected, given)._asdict() | {
            "worst": (expected - given).abs().max().item(),
            "perplexity": text_perplexity(given, tokens),
            "their_perplexity": text_perplexity(expected, tokens),
            "tokens": tokens.numel(),
        }
    return found


def answer(directory, path):
    """What a file goes on with, greedily: the example of the chapter."""
    from annotated_src.edge import edge_generate
    from annotated_src.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(PROMPT)[0].tolist()
    new = edge_generate(path, ids, max_new_tokens=2)
    whole = tokenizer.decode(torch.tensor(ids + new))
    return f"\nThe int8 file, given the ids {ids}, goes on with {new}: *{whole}*\n"


def fresh_memory(places=2048, layers=30, numbers=192, repeats=7):
    """Milliseconds to copy SmolLM2's cache to fresh memory, and to memory at hand."""
    cache = [np.ones((places, numbers), np.float32) for _ in range(2 * layers)]
    held = [array.copy() for array in cache]
    works = {
        "fresh": lambda: [array.copy() for array in cache],
        "at hand": lambda: [np.copyto(*pair) for pair in zip(held, cache, strict=True)],
    }
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    fresh, at_hand = (statistics.median(times[name]) for name in works)
    megabytes = sum(array.nbytes for array in cache) / 1e6
    return (
        f"\nnumpy copies a cache of {places} places, {megabytes:.0f} MB, in "
        f"{fresh:.0f} ms to fresh memory, in {at_hand:.0f} ms to memory that it has.\n"
    )


def texts(directory, count=3):
    """Stretches of a page of Python's manual, as ids."""
    from pydoc_data.topics import topics

    from annotated_src.tokenizer import TextTokenizer

    ids = TextTokenizer.from_pretrained(directory).encode(topics[TEXT])[0]
    return ids[: count * QUALITY_TOKENS].view(count, QUALITY_TOKENS).tolist()
