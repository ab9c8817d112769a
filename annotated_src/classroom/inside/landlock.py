"""Ask Linux to close all files but a few to this process, for good.

Landlock is in the kernel since 5.13; no rights are needed. It also binds code that goes
round Python, as `torch.from_file` and `ctypes` do, and what this process starts.
Source: the kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
NO_NEW_PRIVILEGES = 38
# Execute, write, read a file, list a folder: bits 0 to 3. All others make or remove.
READ, LIST = 1 << 2 | 1 << 3, 1 << 3
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
# How many rights on files each version of the interface knows.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


class Ruleset(ctypes.Structure):
    """What is closed: files, TCP, abstract sockets, and signals to other processes."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "net", "scoped")]


class Beneath(ctypes.Structure):
    """What stays open below a folder."""

    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def around(paths: Iterable[str], secret: list[str]) -> tuple[list[str], list[str]]:
    """List what to open so that some paths are, but nothing secret inside them.

    The first list is of folders whose names may be read, the second of all else.
    """
    names, files = [], []
    for path in map(os.path.realpath, paths):
        inside = [s for s in secret if s.startswith(path + os.sep)]
        if not inside:
            files.append(path)
            continue
        names.append(path)
        others = [e.path for e in os.scandir(path) if e.path not in secret]
        more_names, more_files = around(others, secret)
        names, files = names + more_names, files + more_files
    return names, files


def offered() -> int:
    """Give the version of Landlock that this system has; 0 if it has none."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return 0
    version = ctypes.CDLL(None).syscall(CREATE_RULESET, None, 0, 1)
    return max(version, 0)


def close_files(
    names: Iterable[str], readable: Iterable[str], writable: Iterable[str]
) -> bool:
    """Leave only these open; False where the system cannot do it.

    Of the first, names may be listed; of the second, files be read; of the third, all
    but execution. It binds this thread and all that it starts: call it first of all.

    Raises:
        OSError: the kernel has Landlock and refuses.
    """
    if not (version := offered()):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    every = (1 << RIGHTS[min(version, 5)]) - 1
    rules = Ruleset(every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = called(libc, CREATE_RULESET, ctypes.byref(rules), size, 0)
    rights = ((names, LIST), (readable, READ), (writable, every & ~1))
    for paths, given in rights:
        for path in filter(os.path.exists, paths):
            leave_open(libc, ruleset, path, given & every)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    called(libc, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return True


def leave_open(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Add a file, or a folder with all below it, to what stays open."""
    if not stat.S_ISDIR(Path(path).stat().st_mode):
        rights &= OF_FILES
    folder = os.open(path, os.O_PATH)
    rule = Beneath(rights, folder)
    called(libc, ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
    os.close(folder)


def called(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    """Make a call of the system.

    Raises:
        OSError: it failed.
    """
    result = libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"system call {number}: {os.strerror(error)}")
    return result
