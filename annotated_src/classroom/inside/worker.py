"""The other process: run a student's cells, call their functions, tell what they did.

It is started with one folder on its path, in which the package has no exercises. What
it is asked comes from the process that marks; what it answers is plain data, and no
more than a claim: whether it is right is judged elsewhere.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any, BinaryIO

from annotated_src.classroom.inside import guard, landlock, wire


def main() -> None:
    """Fence this process, then answer questions until there are none."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    setting = pickle.loads(wire.read_frame(questions))
    try:
        notebook, closed = set_up(setting)
    except Exception as problem:
        said = f"{type(problem).__name__}: {problem}"
        wire.write_frame(answers, wire.dumps({"kind": "broken", "error": said}))
        return
    wire.write_frame(answers, wire.dumps({"kind": "ready", "closed": closed}))
    serve(notebook, questions, answers)


def set_up(setting: dict[str, Any]) -> tuple[Any, bool]:
    """Close what is to be closed, and import what a cell may need before that."""
    sys.meta_path[:] = [
        f for f in sys.meta_path if not str(f).count("__editable__")
    ]  # an editable install would lead to the exercises
    secret = [os.path.realpath(path) for path in setting["closed"]]
    lists, files = landlock.around([*setting["readable"], *added(secret)], secret)
    closed = landlock.close_files(lists, files, setting["writable"])

    import torch

    from annotated_src.checks.diagnosis import signature_problem  # noqa: F401
    from annotated_src.checks.running import run
    from annotated_src.classroom.inside.cells import Notebook

    torch.set_num_threads(1)
    run(torch.numel, (torch.zeros(1),))  # what is loaded on the first call
    run(endless, (), 0.01, twice=False)  # ... and when one has to be ended
    notebook = Notebook()
    notebook.run("1 + 1", 0, 5.0)
    guard.limit(setting["memory"], setting["seconds"])
    fence = guard.Fence(setting["closed"], setting["readable"], setting["work"])
    guard.watch(fence)
    return notebook, closed


def added(secret: list[str]) -> list[str]:
    """List the folders of the path that lie elsewhere, as a `.pth` file may say."""
    paths = [os.path.realpath(path) for path in sys.path if Path(path).is_absolute()]
    return [path for path in paths if not guard.within(path, secret)]


def goes_on(told: dict[str, Any]) -> bool:
    """Say whether something was to be ended, and could not."""
    last = told.get("outcomes", [told])[-1:]
    stopped = any(one["kind"] == "timed out" for one in last)
    return stopped and threading.active_count() > 1


def endless() -> None:
    """Go on until somebody ends it."""
    while True:
        pass


def serve(notebook: Any, questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer questions until the stream ends."""
    while True:
        try:
            question = pickle.loads(wire.read_frame(questions))
        except EOFError:
            return
        try:
            told = answered(notebook, question)
            answer = wire.dumps({**told, "busy": goes_on(told)})
            if len(answer) > wire.LIMIT:
                raise ValueError(f"a result of {len(answer)} bytes is too large")
        except BaseException as problem:
            said = f"{type(problem).__name__}: {problem}"[:2000]
            answer = wire.dumps({"kind": "failed", "error": said})
        wire.write_frame(answers, answer)


def answered(notebook: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Run a cell, look up a value, or call a function."""
    if question["ask"] == "run":
        return notebook.run(question["source"], question["number"], question["seconds"])
    name = question["name"]
    if name not in notebook.names:
        return {"kind": "missing"}
    value = notebook.names[name]
    if question["ask"] == "value":
        return {"kind": "value", "value": wire.plain(value)}
    if not callable(value):
        return {"kind": "missing"}
    return called(name, value, question)


def called(name: str, function: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Call a function on each case, until one does not end."""
    from annotated_src.checks.diagnosis import signature_problem
    from annotated_src.checks.running import run

    if problem := signature_problem(wanted(name, question["parameters"]), function):
        return {"kind": "signature", "error": problem[:2000]}
    outcomes = []
    for case in question["cases"]:
        outcome = vars(run(function, case, question["seconds"]))
        try:
            told = {**outcome, "value": wire.plain(outcome["value"])}
        except Exception as problem:
            kind = type(problem).__name__
            error = f"{kind}: what it gives back cannot be handed in: {problem}"
            told = {**outcome, "kind": "raised", "value": None, "error": error}
        for text in ("error", "line", "printed"):
            told[text] = told[text][:2000]
        outcomes.append(told)
        if told["kind"] == "timed out":
            break
    return {"kind": "called", "outcomes": outcomes}


def wanted(name: str, parameters: list[str]) -> Any:
    """Make what `signature_problem` looks at of a task: a name, and parameters."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def solution() -> None:
        """Have a signature, and nothing else."""

    made = inspect.Signature([inspect.Parameter(p, kind) for p in parameters])
    vars(solution)["__signature__"] = made
    return types.SimpleNamespace(name=name, solution=solution)
