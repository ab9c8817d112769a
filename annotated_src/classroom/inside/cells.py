"""Run the cells of a notebook one by one, as Jupyter would, without Jupyter."""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
import types
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from annotated_src.checks.running import OutOfTime, line_of, within

KEPT = 2000


class Bounded(io.TextIOBase):
    """Keeps the first characters that are printed, and forgets the rest."""

    def __init__(self) -> None:
        self.text = ""

    def writable(self) -> bool:
        """Say that one may print here."""
        return True

    def write(self, text: str, /) -> int:
        """Keep what fits."""
        if len(self.text) < KEPT:
            self.text += str(text)[: KEPT - len(self.text)]
        return len(text)


class Quiet:
    """Stands for IPython: magics do nothing, but for those that run their cell."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        """Run what `%%time` and `%%capture` have below them."""
        if name in ("time", "capture"):
            exec(compile(to_python(body), "a cell", "exec"), self.namespace)

    def run_line_magic(self, name: str, line: str, *more: Any) -> None:
        """Run what `%time` has after it."""
        if name == "time":
            exec(compile(to_python(line), "a cell", "exec"), self.namespace)

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: None


def to_python(source: str) -> str:
    """Turn what IPython understands into plain Python."""
    return TransformerManager().transform_cell(source)


class Notebook:
    """The names that cells have made, and how to run one more."""

    def __init__(self) -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names = vars(module)
        shell = Quiet(self.names)
        self.names.update(display=lambda *given, **named: None)
        self.names.update(get_ipython=lambda: shell)

    def run(self, source: str, number: int, seconds: float) -> dict[str, Any]:
        """Run a cell, and tell what happened; nothing that it does ends this."""
        said, found = Bounded(), {"kind": "ran", "error": "", "line": ""}
        name = f"<cell {number}>"

        def cell() -> None:
            text = to_python(source)
            lines = text.splitlines(keepends=True)
            linecache.cache[name] = (len(text), None, lines, name)
            exec(compile(text, name, "exec", dont_inherit=True), self.names)

        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                within(seconds, cell)
        except OutOfTime:
            found["kind"] = "timed out"
        except BaseException as problem:  # sys.exit() ends the cell, not the marking
            found["kind"] = "raised"
            found["error"] = worded(problem)
            at = types.SimpleNamespace(__code__=types.SimpleNamespace(co_filename=name))
            with contextlib.suppress(Exception):
                found["line"] = line_of(problem, at)[:200]  # pyright: ignore
        return {**found, "printed": said.text}


def worded(problem: BaseException) -> str:
    """Write an exception in a line; a hostile one may not even have words."""
    try:
        return f"{type(problem).__name__}: {problem}".strip().removesuffix(":")[:KEPT]
    except Exception:
        return type(problem).__name__
