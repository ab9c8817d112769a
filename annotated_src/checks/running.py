"""Run an attempt on inputs: with a limit on time, on copies, twice."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import linecache
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from annotated_src.checks.comparing import difference

# A first call may load slow parts of a library: leave it time.
SECONDS = 4.0


class OutOfTime(SystemExit):
    """Thrown into an attempt that runs too long; `except Exception` lets it pass.

    A SystemExit, as a thread that ends by one ends silently.
    """


@dataclass(frozen=True)
class Outcome:
    """What one call did.

    `kind` is "returned", "raised" or "timed out". `changed` holds the places of the
    inputs that are no longer what they were; `steady` is False when a second call with
    another seed and the same inputs gave something else.
    """

    kind: str
    value: Any = None
    error: str = ""
    line: str = ""
    changed: tuple[int, ...] = ()
    steady: bool = True
    printed: str = ""


def run(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    seconds: float = SECONDS,
    twice: bool = True,
) -> Outcome:
    """Call a function on copies of the inputs, and tell what happened.

    The limit ends loops of Python. One long call into a library goes on in the back,
    and is no longer waited for. The global seeds are fixed, and put back afterwards.
    """
    first = run_once(function, inputs, seconds, seed=0)
    if first.kind != "returned" or not twice:
        return first
    second = run_once(function, inputs, seconds, seed=1)
    if second.kind != "returned":
        return second
    return Outcome(**{**vars(first), "steady": alike(first.value, second.value)})


def alike(one: Any, other: Any) -> bool:
    """Say whether two results are the same, as far as they can be compared."""
    try:
        return difference(one, other) is None
    except Exception:  # whatever an attempt has made: the answer names its kind
        return True


def run_once(
    function: Callable[..., Any], inputs: tuple[Any, ...], seconds: float, seed: int
) -> Outcome:
    """Call a function once, on copies of the inputs."""
    given, printed = copy.deepcopy(inputs), io.StringIO()
    kind, value, error, line = "returned", None, "", ""
    with seeded(seed), contextlib.redirect_stdout(printed):
        try:
            value = within(seconds, lambda: function(*given))
        except OutOfTime:
            kind = "timed out"
        except KeyboardInterrupt:
            raise
        except BaseException as problem:  # even sys.exit() in an attempt is an answer
            kind, line = "raised", line_of(problem, function)
            error = f"{type(problem).__name__}: {problem}".strip().removesuffix(":")
    pairs = enumerate(zip(inputs, given, strict=True))
    changed = tuple(i for i, (before, after) in pairs if difference(before, after))
    return Outcome(kind, value, error, line, changed, printed=printed.getvalue())


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call in a thread of its own, and end that thread when it takes longer.

    OutOfTime is thrown into the thread, again and again until it lets go; so nothing
    can arrive late in the caller. A signal would work in the main thread only, and not
    on Windows.

    Raises:
        OutOfTime: the call took longer.
    """
    results: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            results.append((call(), None))
        except BaseException as problem:  # told to the caller
            results.append((None, problem))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        worker.join(seconds)
        in_time = not worker.is_alive()
    finally:  # an impatient user, too, ends it
        for _ in range(50):
            if not worker.is_alive():
                break
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(worker.ident or 0), ctypes.py_object(OutOfTime)
            )
            worker.join(0.02)
    if not in_time:
        raise OutOfTime
    value, problem = results[0]
    if problem is not None:
        raise problem
    return value


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix the seeds of Python, numpy and torch, and its default dtype, for a while."""
    python = random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002 - an attempt may use it
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        # The CPU's only: torch.manual_seed seeds GPUs too, which nobody would put back.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def line_of(problem: BaseException, function: Callable[..., Any]) -> str:
    """Find the line of the attempt in which an exception came up, as text."""
    code = getattr(function, "__code__", None)
    file, found, trace = getattr(code, "co_filename", ""), "", problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            text = linecache.getline(file, trace.tb_lineno).strip()
            found = f"line {trace.tb_lineno}: {text}" if text else ""
        trace = trace.tb_next
    return found
