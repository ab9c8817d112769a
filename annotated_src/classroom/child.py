"""A process for a student's code: start it, ask it, stop it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_src.classroom.inside import wire

PACKAGE = Path(__file__).resolve().parents[1]
INSIDE = PACKAGE / "classroom" / "inside"
START = (
    "import sys; sys.path.insert(0, {!r}); "
    "from annotated_src.classroom.inside.worker import main; main()"
)
# What the system's own libraries read, and what every program may write to.
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/etc", "/bin", "/sys/devices/system/cpu"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo"),
)
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero", "/dev/shm")


@dataclass(frozen=True)
class Limits:
    """What a notebook may take: seconds for a cell, a call, all; MiB of memory."""

    cell: float = 20.0
    call: float = 5.0
    notebook: float = 300.0
    memory: int = 2048


class Stopped(Exception):  # noqa: N818 - not always an error
    """A student's process ended, or had to be ended; `why` is a sentence."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@functools.cache
def stripped_package() -> Path:
    """Copy the package without the exercises, for as long as this program runs."""
    home = Path(tempfile.mkdtemp(prefix="marking-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    copy = home / PACKAGE.name

    def left_out(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == PACKAGE:
            return [n for n in names if n == "exercises"]
        if Path(folder) == PACKAGE / "classroom":
            return [n for n in names if n not in ("__init__.py", "inside")]
        return []

    shutil.copytree(PACKAGE, copy, ignore=left_out)
    (copy / "exercises").mkdir()
    shutil.copy(INSIDE / "stand_in.py", copy / "exercises" / "__init__.py")
    return home


def closed_folders(course: Path | None) -> list[str]:
    """List what a student's code must not read: the real package, the course."""
    root = PACKAGE.parent
    is_checkout = (root / "pyproject.toml").exists()
    ours = [course, course.with_name("solutions")] if course else []
    return [str(path) for path in (root if is_checkout else PACKAGE, *ours)]


class Child:
    """A process for a student's code. It knows no solution; see `inside.guard`."""

    def __init__(self, limits: Limits, course: Path | None = None) -> None:
        home, work = stripped_package(), tempfile.mkdtemp(prefix="student-")
        self.work = Path(work)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START.format(str(home))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(work),
            cwd=work,
            start_new_session=True,
        )
        setting = {
            "memory": limits.memory * 2**20,
            "seconds": int(limits.notebook) + 60,
            "readable": [*SYSTEM, sys.prefix, sys.base_prefix, str(home)],
            "writable": [work, *DEVICES],
            "closed": closed_folders(course),
            "work": work,
        }
        ready = self.ask(setting, 120.0)
        if ready.get("kind") != "ready":
            self.close()
            raise RuntimeError(f"no process for student code: {ready.get('error')}")
        self.closed = bool(ready.get("closed"))

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask, and wait for the answer: a claim of a process that nobody trusts.

        Raises:
            Stopped: there was no answer in time, or none that can be read.
        """
        box: queue.Queue[Any] = queue.Queue(1)
        arguments = (self.process, pickle.dumps(question), box)
        threading.Thread(target=exchange, args=arguments, daemon=True).start()
        try:
            found = box.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.close()
            why = f"It did not come to an end in {seconds:.0f} seconds."
            raise Stopped(f"{why} Does every loop end?") from None
        try:
            if isinstance(found, Exception):
                raise found
            return wire.loads(found)
        except (EOFError, OSError):
            raise Stopped(ending(self.close(2.0))) from None
        except ValueError as problem:
            self.close()
            raise Stopped(f"It sent something unreadable: {problem}.") from None

    def close(self, patience: float = 0.0) -> int:
        """End the process, and all that it may have started; give its exit status.

        One that is about to end by itself has some seconds to do so.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        status = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                stream.close() if stream else None
        shutil.rmtree(self.work, ignore_errors=True)
        return status


def exchange(
    process: subprocess.Popen[bytes], question: bytes, box: queue.Queue[Any]
) -> None:
    """Send a question and wait for the answer, in a thread of its own."""
    try:
        if process.stdin is None or process.stdout is None:
            raise OSError("a process without streams")
        wire.write_frame(process.stdin, question)
        box.put(wire.read_frame(process.stdout))
    except (OSError, EOFError, ValueError) as problem:
        box.put(problem)


def ending(status: int) -> str:
    """Say how a process ended: by a signal, or by itself."""
    names = {-s.value: s.name for s in signal.Signals}
    if status in names:
        why = f"It was ended by the system ({names[status]}): "
        return why + "too much memory or time, or a fault in a library."
    return f"It ended the whole process, with status {status}."


def environment(work: str) -> dict[str, str]:
    """Make the variables of a student's process: none of them is a secret."""
    kept: Iterable[str] = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")
    given = {name: os.environ[name] for name in kept if name in os.environ}
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    places = dict.fromkeys(("HOME", "TMPDIR", "TEMP", "TMP", "MPLCONFIGDIR"), work)
    other = {"LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**given, **quiet, **places, **other, "PYTHONDONTWRITEBYTECODE": "1"}
