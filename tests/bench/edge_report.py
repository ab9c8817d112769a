"""From numbers to Markdown: the tables of book/speed_device.md."""

import platform
from pathlib import Path

from tests.bench.report import cpu_name, installed, row

PEER = "exported code, in torch"
ORDER = (
    PEER,
    "transformers",
    "plain",
    "fast",
    ".tflite float32",
    ".tflite int8",
    ".tflite int8, cache handed over",
)
MODELS = ("small", "SmolLM2")
MORE = 5  # times as many turns for the small model: they are short


def write(tables, files, graded, openings, job):
    """All tables, and what they were measured with."""
    parts = [machine(tables, job)]
    for threads, found in tables.items():
        parts.append(f"### {threads} thread{'s' * (threads > 1)}")
        parts += [times(found["rows"]), budget(found)]
        parts.append("#### What each idea brings")
        parts += [ablations(model, one) for model, one in found["ideas"].items()]
    parts += ["### The files", sizes(files, job), opened(openings)]
    parts += ["### How well the files do", grades(graded)]
    return "\n\n".join(parts) + "\n"


def machine(tables, job):
    packages = ("torch", "transformers", "ai-edge-litert", "litert-torch")
    versions = ", ".join(f"{name} {installed(name)}" for name in packages)
    rates = ", ".join(
        f"{found['limits']['bytes'] / 1e9:.0f} GB/s with {threads} "
        f"thread{'s' * (threads > 1)}"
        for threads, found in tables.items()
    )
    return (
        f"Measured on {cpu_name()}, Python {platform.python_version()}, {versions}. "
        f"Memory at best: {rates}. Medians of {job['repeats']} turns of SmolLM2, and "
        f"of {job['repeats'] * MORE} of the small model."
    )


def times(rows):
    """Milliseconds; in brackets, how many times as fast as the exported code."""
    lines = [row("ms", *ORDER), row("---", *("---:" for _ in ORDER))]
    for task, cells in rows.items():
        lines.append(row(task, *(cell(cells, name) for name in ORDER)))
    return "\n".join(lines)


def cell(cells, name):
    if name not in cells:
        return "–"
    digits = 2 if cells[PEER] < 10 else 1
    text = f"{cells[name]:.{digits}f}"
    return text if name == PEER else f"{text} ({cells[PEER] / cells[name]:.1f}×)"


def budget(found):
    """Of each decode step: what it must move, in how many operators, and how fast."""
    lines = [
        "A decode step: operators dispatched and microseconds for each; megabytes of "
        "weights and cache that are read and written, at which rate, and which share "
        "of the time memory at its best would need for them.",
        "",
        row("", "operators", "µs each", "MB", "GB/s", "memory's share"),
        row("---", *("---:" for _ in range(5))),
    ]
    for model in MODELS:
        cells = found["rows"][f"{model}: decode"]
        about = found["about"][model]
        for name in ORDER:
            one, ms = about[name], cells[name]
            num_bytes = step_bytes(about["config"], one)
            lines.append(
                row(
                    f"{model}: {name}",
                    str(one["operators"]),
                    f"{1e3 * ms / one['operators']:.1f}",
                    f"{num_bytes / 1e6:.1f}",
                    f"{num_bytes / ms / 1e6:.1f}",
                    f"{num_bytes / found['limits']['bytes'] * 1e3 / ms:.0%}",
                )
            )
    return "\n".join(lines)


def step_bytes(config, one):
    """Every weight once; the cache as often as the contender moves it, in float32."""
    c = config
    heads = (c["num_heads"] + c["num_kv_heads"]) * 2 * c["head_dim"]
    block = c["embed_dim"] * (heads + 3 * c["ffn_dim"])
    weights = c["num_layers"] * block + c["vocab_size"] * c["embed_dim"]
    place = 2 * 4 * c["num_layers"] * c["num_kv_heads"] * c["head_dim"]
    return one["weight_bytes"] * weights + place * one["moved"]


def ablations(model, found):
    """A model with each idea and without it; in brackets, of float32's time."""
    base = found["float32"]
    lines = [
        row(f"{model}: ms", "decode", "operators of a step", "prefill"),
        row("---", *("---:" for _ in range(3))),
    ]
    for name, one in found.items():
        cells = {
            task: f"{one[task]:.2f} ({one[task] / base[task]:.2f})"
            if one[task]
            else "–"
            for task in ("decode", "prefill")
        }
        count = str(one["operators"])
        lines.append(row(name, cells["decode"], count, cells["prefill"]))
    return "\n".join(lines)


def sizes(files, job):
    """Megabytes, and what the conversion took."""
    lines = [
        row("", "MB", "of the checkpoint", "to convert, s", "peak, MB"),
        row("---", *("---:" for _ in range(4))),
    ]
    for model in MODELS:
        folder = Path(job["directories"][model])
        whole = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        lines.append(row(f"{model}: checkpoint", f"{whole / 1e6:.1f}", "", "", ""))
        for name in ("float32", "int8"):
            file = files[model][name]
            lines.append(
                row(
                    f"{model}: .tflite {name}",
                    f"{file['bytes'] / 1e6:.1f}",
                    f"{file['bytes'] / whole:.0%}",
                    f"{file['seconds']:.0f}",
                    f"{file['peak']:.0f}",
                )
            )
    return "\n".join(lines)


def opened(openings):
    """What a process without torch takes until the first scores, and on the whole."""
    lines = [
        "A process that has numpy and ai-edge-litert and no torch, SmolLM2:",
        "",
        row("", "open, s", "to the first scores, s", "peak, MB"),
        row("---", *("---:" for _ in range(3))),
    ]
    for name, one in openings.items():
        lines.append(
            row(
                f".tflite {name}",
                f"{one['open']:.2f}",
                f"{one['first']:.2f}",
                f"{one['peak']:.0f}",
            )
        )
    return "\n".join(lines)


def grades(graded):
    """Teacher-forced against the plain path in float32."""
    tokens = next(iter(graded.values()))["tokens"]
    theirs = next(iter(graded.values()))["their_perplexity"]
    lines = [
        f"Teacher-forced on {tokens} tokens of Python's own manual, against the plain "
        f"path in float32 (perplexity {theirs:.2f}):",
        "",
        row("", "same best token", "KL, nats a token", "worst logit", "perplexity"),
        row("---", *("---:" for _ in range(4))),
    ]
    for name, one in graded.items():
        lines.append(
            row(
                f".tflite {name}",
                f"{one['agreement']:.1%}",
                f"{one['mean_kl']:.2g}",
                f"{one['worst']:.1g}",
                f"{one['perplexity']:.2f}",
            )
        )
    return "\n".join(lines)
