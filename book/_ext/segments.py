"""A module's text, cut into notes and the code that they are about."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Segment:
    """A note, and the lines of code beside it; either may be empty.

    name is the dotted name, below the module, of the function or class that begins
    here, or empty; code has line numbers, from 1.
    """

    name: str = ""
    kind: str = ""  # "function", "class" or "method", where name is given
    docstring: str = ""
    comment: list[str] = field(default_factory=list)
    code: list[tuple[int, str]] = field(default_factory=list)


def segments(source: str) -> list[Segment]:
    """Cut a module where a definition begins, and where a comment of its own stands.

    Every line of the module is in exactly one segment: as code, or as the docstring
    or comment that became its note. Blank lines at a segment's ends are left out.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    starts = {_first_line(node): (name, node) for name, node in definitions(tree)}
    notes = dict(_docstrings(tree))
    taken = {n for first, (_, last) in notes.items() for n in range(first, last + 1)}
    comments = _comment_lines(source) - taken
    found = [Segment()]
    for number, line in enumerate(lines, 1):
        if number in starts:
            name, node = starts[number]
            if not _only_comment(found[-1]):  # a comment above belongs to it
                found.append(Segment())
            found[-1].name, found[-1].kind = name, _kind(name, node)
        if number in notes:
            found[-1].docstring = notes[number][0]
        elif number in comments:
            if not _only_comment(found[-1]) and _holds(found[-1]):
                found.append(Segment())
            found[-1].comment.append(line.strip().removeprefix("#").strip())
        elif number not in taken:
            found[-1].code.append((number, line))
    return [_trimmed(segment) for segment in found if _holds(segment)]


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Find the functions and classes of a module, and the methods of its classes.

    `_` names nothing: the exercises register functions that nobody calls.
    """
    for node in tree.body:
        if isinstance(node, Definition) and node.name != "_":
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Definition):
                    yield f"{node.name}.{inner.name}", inner


def _kind(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if "." in name else "function"


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(item.lineno for item in node.decorator_list)])


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    """Find the docstrings: first line to (text, last line)."""
    for node in (tree, *(node for _, node in definitions(tree))):
        text = ast.get_docstring(node)
        if text is not None:
            place = node.body[0]
            yield place.lineno, (text, place.end_lineno or place.lineno)


def _comment_lines(source: str) -> set[int]:
    """Number the lines that hold a comment and nothing else, outside of brackets."""
    depth, found = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        alone = token.line.lstrip().startswith("#")
        directive = re.match(r"#\s*(ruff|noqa|type|pyright)\b", token.string)
        if token.type == tokenize.COMMENT and alone and not depth and not directive:
            found.add(token.start[0])
    return found


def _only_comment(segment: Segment) -> bool:
    return bool(segment.comment) and not any(line.strip() for _, line in segment.code)


def _holds(segment: Segment) -> bool:
    return bool(
        segment.name
        or segment.docstring
        or segment.comment
        or any(line.strip() for _, line in segment.code)
    )


def _trimmed(segment: Segment) -> Segment:
    code = segment.code
    while code and not code[0][1].strip():
        code = code[1:]
    while code and not code[-1][1].strip():
        code = code[:-1]
    segment.code = code
    return segment
