"""Fence a student's process: memory, time, files, processes, network.

Three fences, each behind the other: limits of the system (`resource`), the kernel's
Landlock where there is one, and a hook of Python, which is there on every system and
says in words what was tried. The hook stops what one writes in a notebook; it does not
stop those who go round Python. The kernel does, as far as Landlock goes: files, TCP,
signals. Against a class that attacks the machine itself, give each student a container.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of Python that a notebook of exercises has no need of, by their beginnings.
REFUSED = {
    "starting a process": (
        *("subprocess.", "os.system", "os.fork", "os.posix_spawn", "os.exec"),
        *("os.spawn", "os.startfile", "pty.spawn"),
    ),
    "using the network": (
        "socket.",
        "urllib.",
        "ftplib.",
        "http.client.",
        "webbrowser",
    ),
    "sending signals": ("os.kill", "signal.pthread_kill"),
    "changing the limits": ("resource.setrlimit", "resource.prlimit"),
    "going round Python": ("ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata"),
    "opening a database": ("sqlite3.",),
}
CHANGING = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil."),
)


class Fence:
    """Which folders are closed, which are open inside them, which is for writing."""

    def __init__(self, closed: Iterable[str], opened: Iterable[str], work: str) -> None:
        self.closed = [os.path.realpath(path) for path in closed]
        self.opened = [os.path.realpath(path) for path in (*opened, work)]
        self.work = [os.path.realpath(work), os.path.realpath(os.devnull)]

    def hidden(self, path: str) -> bool:
        """Say whether a file is one that a student must not read.

        Of the folders around it, the innermost decides: either may be in the other.
        """
        real = os.path.realpath(path)
        return depth(real, self.closed) > depth(real, self.opened)

    def fixed(self, path: str) -> bool:
        """Say whether a file is one that a student must not change."""
        return not within(path, self.work)


def within(path: str, folders: list[str]) -> bool:
    """Say whether a path is one of the folders, or below one."""
    real = os.path.realpath(path)
    return any(real == f or real.startswith(f + os.sep) for f in folders)


def depth(real: str, folders: list[str]) -> int:
    """Give the length of the innermost of the folders around a path; 0 if none is."""
    return max((len(f) for f in folders if within(real, [f])), default=0)


def watch(fence: Fence) -> None:
    """Refuse, from now on and for good, what a notebook of exercises does not need."""
    refused = tuple((start, why) for why, all_ in REFUSED.items() for start in all_)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        for start, why in refused:
            if event.startswith(start):
                raise PermissionError(f"not while this is marked: {why}")
        if event == "open" and isinstance(given[0], str | bytes):
            path, flags = os.fsdecode(given[0]), given[2]
            if fence.hidden(path):
                raise PermissionError("not while this is marked: reading this file")
            if flags & WRITING and fence.fixed(path):
                raise PermissionError("not while this is marked: writing this file")
        elif event.startswith(CHANGING):
            for path in given:
                if isinstance(path, str | bytes) and fence.fixed(os.fsdecode(path)):
                    raise PermissionError("not while this is marked: changing files")

    sys.addaudithook(hook)


def limit(memory: int, seconds: int) -> None:
    """Limit what this process may take: more bytes of memory, and seconds of CPU."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 64 * 2**20,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            pages = int(file.read().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
