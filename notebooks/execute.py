"""Run the chapters whose code changed, and write their notebooks with outputs.

    python notebooks/execute.py            those that changed since they last ran here
    python notebooks/execute.py --force    all
    python notebooks/execute.py llama/04   those whose path contains this
    python notebooks/execute.py --runnable list the notebooks that can run here

A chapter that runs the real model can only do so where the model is, and one that
makes a file for a device only where the converter is.

A chapter is out of date when its own .py, or a module of annotated_src that it uses,
differs from what last ran. Nothing in the output depends on the time or the machine, so
running a chapter again gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from annotated_src.weights import WeightsError, smollm2

ROOT = Path(__file__).resolve().parents[1]
STAMPS = ROOT / ".build" / "executed.json"
PACKAGE = "annotated_src"
# One thread, so that sums are added in the same order everywhere.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # what a chapter tries is no progress of whoever runs it here
    "ANNOTATED_SRC_PROGRESS": str(ROOT / ".build" / "progress.json"),
}


def chapters() -> list[Path]:
    """List the percent scripts, in the book's order."""
    return sorted(Path(__file__).parent.glob("*/*.py"))


def imported_modules(path: Path) -> set[Path]:
    """Find the files of the package that a file imports, itself not included."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.split(".")[0] == PACKAGE:
                module = ROOT / Path(*name.split("."))
                candidates = (module.with_suffix(".py"), module / "__init__.py")
                found.update(c for c in candidates if c.exists())
    return found - {path}


def dependencies(path: Path) -> set[Path]:
    """Follow the imports of a chapter through the package."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        fresh = imported_modules(waiting.pop()) - seen
        seen |= fresh
        waiting.extend(fresh)
    return seen


def needs_weights(path: Path) -> bool:
    """Say whether a chapter runs the real model."""
    return ROOT / PACKAGE / "weights.py" in imported_modules(path)


def needs_converter(path: Path) -> bool:
    """Say whether a chapter makes a file for a device."""
    return ROOT / PACKAGE / "export.py" in imported_modules(path)


def key(path: Path) -> str:
    """Name a chapter as the stamps and the messages do: llama/04_rope."""
    return path.relative_to(Path(__file__).parent).with_suffix("").as_posix()


def fingerprint(path: Path) -> str:
    """Hash a chapter with all the package code that it can reach, and its notebook."""
    return sources_hash(path) + hash_of([path.with_suffix(".ipynb")])


def sources_hash(path: Path) -> str:
    """Hash what goes into a run of a chapter."""
    return hash_of([path, *sorted(dependencies(path))])


def hash_of(files: list[Path]) -> str:
    """Hash the bytes of some files; one that is not there counts as empty."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()


def execute(path: Path) -> Path:
    """Run one percent script and write the paired notebook beside it."""
    os.environ.update(QUIET)
    notebook = jupytext.read(path, fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha1(f"{path.stem}:{i}".encode()).hexdigest()[:8]
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # or the same text may come in other pieces
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    nbformat.validate(notebook)
    target = path.with_suffix(".ipynb")
    scratch = target.with_suffix(".part")
    nbformat.write(notebook, scratch)
    scratch.replace(target)
    return target


def blocked_here() -> dict[str, list[Path]]:
    """List the chapters that cannot run here, by what is missing."""
    blocked = {}
    try:
        smollm2(fetch=False)
    except WeightsError:
        blocked["real model"] = [path for path in chapters() if needs_weights(path)]
    if importlib.util.find_spec("litert_torch") is None:
        blocked["converter"] = [path for path in chapters() if needs_converter(path)]
    return blocked


def save(stamps: dict[str, str]) -> None:
    """Remember what ran, in one step: a killed run leaves the old file whole."""
    STAMPS.parent.mkdir(exist_ok=True)
    scratch = STAMPS.with_suffix(".part")
    scratch.write_text(json.dumps(stamps, indent=1, sort_keys=True))
    scratch.replace(STAMPS)


def main() -> int:
    """Run what is out of date, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--runnable", action="store_true")
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args()
    blocked = blocked_here()
    for what, paths in blocked.items():
        names = ", ".join(map(key, paths))
        print(f"no {what} here; saved output stays in: {names}", file=sys.stderr)
    runnable = [p for p in chapters() if not any(p in b for b in blocked.values())]
    if options.runnable:
        print(*(p.with_suffix(".ipynb").relative_to(ROOT) for p in runnable), sep="\n")
        return 0
    stamps = json.loads(STAMPS.read_text()) if STAMPS.exists() else {}
    wanted = [
        path
        for path in runnable
        if not options.parts or any(part in key(path) for part in options.parts)
    ]
    if not wanted:
        parser.error(f"no chapter that can run here matches {options.parts}")
    stale = [
        path
        for path in wanted
        if options.force or stamps.get(key(path)) != fingerprint(path)
    ]
    print(f"{len(stale)} of {len(wanted)} chapters to run", flush=True)
    failed = 0
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        before = {path: sources_hash(path) for path in stale}
        running = {pool.submit(execute, path): path for path in stale}
        for future in as_completed(running):
            path = running[future]
            if error := future.exception():
                failed += 1
                print(f"  FAILED {key(path)}\n{error}", file=sys.stderr, flush=True)
                continue
            if sources_hash(path) == before[path]:  # else it was edited as it ran
                stamps[key(path)] = fingerprint(path)
                save(stamps)
            print(f"  ran {key(path)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
