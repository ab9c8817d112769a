"""From numbers to Markdown: the tables of book/speed.md."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

START, END = "<!-- make bench writes from here -->", "<!-- to here -->"
PARAMETERS = 134_515_008  # of SmolLM2-135M; the head is the embedding
EMBEDDING = 49152 * 576
LAYERS, WIDTH, KV_WIDTH = 30, 576, 192


def write(tables, loading, job):
    """All of the CPU's tables, and what they were measured with."""
    parts = [machine(tables)]
    for threads, found in tables.items():
        heading = f"{threads} thread{'s' * (threads > 1)}"
        parts += [f"### {heading}", times(found), behind(found)]
        parts.append(bounds(found, job))
    parts += ["### Loading", loads(loading)]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine(tables):
    packages = ("torch", "transformers", "xllamacpp")
    versions = ", ".join(f"{name} {installed(name)}" for name in packages)
    rates = "; ".join(
        f"{threads} thread{'s' * (threads > 1)}: memory "
        f"{found['limits']['bytes'] / 1e9:.0f} GB/s, matrices "
        f"{found['limits']['float32'] / 1e9:.0f} billion multiply-adds a second in "
        f"float32, {found['limits']['bfloat16'] / 1e9:.0f} in bfloat16"
        for threads, found in tables.items()
    )
    return (
        f"Measured on {cpu_name()}, Python {platform.python_version()}, {versions}. "
        f"What the machine does at best, {rates}."
    )


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (
        line.partition(":") for line in lines
    )}  # fmt: skip
    cores = sum(line.startswith("processor") for line in lines)
    return f"{found.get('model name', platform.machine())}, {cores} cores"


def times(found):
    """Milliseconds of the peer; of the others too, and how many times as fast."""
    names = list(next(iter(found["rows"].values())))
    names.sort(key=lambda name: name != "transformers")
    lines = [row("ms", *names), row("---", *("---:" for _ in names))]
    for task, cells in found["rows"].items():
        base = cells["transformers"]
        lines.append(
            row(
                task,
                *(
                    f"{cells[name]:.1f}"
                    if name == "transformers"
                    else f"{cells[name]:.1f} ({base / cells[name]:.2f}×)"
                    for name in names
                ),
            )
        )
    return "\n".join(lines)


def bounds(found, job):
    """The least time that each task can take on this machine, and the share reached."""
    names = list(found["weight_bytes"])
    names.sort(key=lambda name: name != "transformers")
    lines = [
        "The least time that the machine's limits allow, in ms, and how much of the "
        "measured time that is:",
        "",
        row("at least", *names),
        row("---", *("---:" for _ in names)),
    ]
    for task, cells in found["rows"].items():
        least = {name: 1e3 * seconds(task, name, found) for name in names}
        shares = (f"{n:.1f} ({n / cells[name]:.0%})" for name, n in least.items())
        lines.append(row(task, *shares))
    return "\n".join(lines)


def seconds(task, name, found):
    """Bytes over bandwidth, or multiply-adds over the rate: the larger of the two.

    Weights are read once a step. Of the cache, keys and values of every row are read.
    """
    limits, weight_bytes = found["limits"], found["weight_bytes"][name]
    kind, middle, last = task.split(", ")
    batch_size = int(last.split()[-1])
    tokens = next(int(word) for word in middle.split() if word.isdigit())
    num_bytes, products = weight_bytes * PARAMETERS, batch_size * PARAMETERS
    # llama.cpp's cache is of 2 bytes.
    size = 2 if name.startswith("llama.cpp") else 4
    if kind == "decode":
        num_bytes += batch_size * tokens * LAYERS * 2 * KV_WIDTH * size
        products += batch_size * LAYERS * 2 * WIDTH * tokens
    else:  # scores for the last token only, attention over half of the square
        products = batch_size * tokens * (PARAMETERS - EMBEDDING)
        products += batch_size * (EMBEDDING + LAYERS * WIDTH * tokens**2)
    # The quantised ones may multiply in a smaller type; bfloat16's rate is measured.
    rate = limits["float32" if weight_bytes > 3 else "bfloat16"]
    return max(num_bytes / limits["bytes"], products / rate)


def behind(found):
    """Where the plain path is not ahead: the operators that take the time."""
    lines = []
    for task, both in found["profiles"].items():
        lines.append(f"Where the plain path is not ahead: {task}. Share of the time:")
        for name, events in both.items():
            shares = ", ".join(f"`{event}` {share:.0%}" for event, share in events)
            lines.append(f"- {name}: {shares}")
        lines.append("")
    return "\n".join(lines)


def loads(loading):
    """Time and memory until loaded, and to the first logits; how the peer compares."""
    titles = "load, s", "peak, MB", "to the first logits, s", "peak, MB"
    lines = [row("", *titles), row("---", *("---:" for _ in titles))]
    for name, found in loading.items():
        cells = []
        for key, value in found.items():
            cell = f"{value:.2f}" if key.startswith("seconds") else f"{value:.0f}"
            if name != "transformers" and key.startswith("seconds"):
                cell += f" ({loading['transformers'][key] / value:.2f}×)"
            cells.append(cell)
        lines.append(row(name, *cells))
    return "\n".join(lines)


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def put_into(path, text):
    """Replace what stands between the two marks of a page."""
    before, start, rest = path.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path.name} lacks the marks {START} and {END}")
    path.write_text(f"{before}{START}\n\n{text}\n{END}{after}", "utf-8")
