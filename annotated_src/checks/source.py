"""The source of a function, as an exercise shows it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

TO_DO = "    raise NotImplementedError"


def source_of(function: Callable[..., Any], name: str) -> str:
    """Give a function's source under a name, without its decorators."""
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    node = ast.parse(text).body[0]
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"a function made by `def` was expected, got {function!r}")
    lines = text.rstrip().splitlines()[node.lineno - 1 :]
    return "\n".join(lines).replace(f"def {node.name}(", f"def {name}(", 1)


def starter_of(function: Callable[..., Any], name: str) -> str:
    """Give a function's signature and docstring, and nothing of what it does."""
    source = source_of(function, name)
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
        raise ValueError(f"{name} needs a docstring: it goes to the student")
    lines = source.splitlines()[: node.body[0].end_lineno]
    return "\n".join([*lines, TO_DO])


def body_of(source: str) -> str:
    """Give the lines of a function's source below its signature."""
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"a function made by `def` was expected, got {source!r}")
    return "\n".join(source.splitlines()[node.body[0].lineno - 1 :])


def imports_of(function: Callable[..., Any]) -> str:
    """Give the import lines of a function's module that its students need too.

    Those of the machinery (`annotated_src.checks`) are left out.
    """
    module = inspect.getmodule(inspect.unwrap(function))
    tree = ast.parse(inspect.getsource(module)) if module else ast.Module([], [])
    kept = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            machinery = (node.module or "").startswith("annotated_src.checks")
            if not machinery and node.module not in ("__future__", "collections.abc"):
                kept.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            kept.append(ast.unparse(node))
    return "\n".join(kept)
