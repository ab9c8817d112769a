"""Compare what came back with what should have: type, shape, dtype, then values."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from annotated_src.checks.describing import as_tensor, describe, kind_of


class Difference(NamedTuple):
    """The first difference of two values.

    `kind` is "type", "shape", "length", "keys", "dtype" or "values"; `where` names the
    place inside a list, a dictionary or an object, as an index would: `[0]['keys']`.
    """

    kind: str
    where: str
    expected: str
    actual: str
    note: str = ""


def difference(
    expected: Any, actual: Any, rtol: float = 0.0, atol: float = 0.0, where: str = ""
) -> Difference | None:
    """Find the first difference between two values, or None.

    Tensors and arrays must have the same shape and dtype; NaN equals NaN. A list equals
    a tuple, and a number equals a tensor of one number, as nobody confuses them.
    Modules are compared by their state, other objects by their attributes.
    """
    arrays = Tensor | np.ndarray
    if isinstance(expected, arrays):
        return array_difference(expected, actual, rtol, atol, where)
    if isinstance(actual, arrays) and actual.ndim == 0 and is_number(expected):
        actual = actual.item()
    if is_number(expected):
        return number_difference(expected, actual, rtol, atol, where)
    if isinstance(expected, list | tuple):
        return sequence_difference(expected, actual, rtol, atol, where)
    if isinstance(expected, dict):
        return mapping_difference(expected, actual, rtol, atol, where)
    if not isinstance(actual, type(expected)):
        return Difference("type", where, kind_of(expected), kind_of(actual))
    if (inside := attributes(expected)) is not None:
        theirs = attributes(actual) or {}
        return mapping_difference(inside, theirs, rtol, atol, where)
    # a generator or a function is equal to itself alone: nothing to compare
    if type(expected).__eq__ is not object.__eq__ and expected != actual:
        return Difference("values", where, describe(expected), describe(actual))
    return None


def is_number(value: Any) -> bool:
    """Say whether a value is a number or a truth value of Python or numpy."""
    return isinstance(value, numbers.Number | np.number | np.bool)


def attributes(value: Any) -> dict[str, Any] | None:
    """Give what an object holds; None for strings, sets and other plain values."""
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if callable(value) or isinstance(value, torch.Generator):
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def array_difference(
    expected: Tensor | np.ndarray, actual: Any, rtol: float, atol: float, where: str
) -> Difference | None:
    """Compare with a tensor or an array: of what, in which shape, then the numbers."""
    x, y = as_tensor(expected), as_tensor(actual)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return tensor_difference(x, y, rtol, atol, where)
    both = isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray)
    if both and np.array_equal(expected, actual):
        return None
    return Difference("type", where, kind_of(expected), kind_of(actual))


def tensor_difference(
    expected: Tensor, actual: Tensor, rtol: float, atol: float, where: str
) -> Difference | None:
    """Compare two tensors: shape first, then dtype, then numbers."""
    if expected.shape != actual.shape:
        shapes = str(tuple(expected.shape)), str(tuple(actual.shape))
        return Difference("shape", where, *shapes)
    if expected.dtype != actual.dtype:
        kinds = (str(x.dtype).removeprefix("torch.") for x in (expected, actual))
        return Difference("dtype", where, *kinds)
    x, y = (t.detach().to("cpu") for t in (expected, actual))
    if not x.is_floating_point() and not x.is_complex():
        wrong = x != y
    else:
        wide = torch.complex128 if x.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        wrong = ~torch.isclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return None
    place = tuple(int(i) for i in wrong.nonzero()[0])
    at = f", the first at {place}" if place else ""
    note = f"{int(wrong.sum())} of {wrong.numel()} numbers differ{at}"
    return Difference("values", where, describe(expected), describe(actual), note)


def number_difference(
    expected: Any, actual: Any, rtol: float, atol: float, where: str
) -> Difference | None:
    """Compare with a number; a truth value is no number, and no number one."""
    truth = bool | np.bool
    if not is_number(actual) or isinstance(expected, truth) != isinstance(
        actual, truth
    ):
        return Difference("type", where, kind_of(expected), kind_of(actual))
    both_nan = expected != expected and actual != actual
    whole = int | np.integer
    if isinstance(expected, whole) and not isinstance(actual, whole):
        return Difference("type", where, kind_of(expected), kind_of(actual))
    # a tolerance is for fractions: a count is right or wrong, and so is infinity
    loose = not isinstance(expected, whole) and np.isfinite(expected)
    room = (atol + rtol * abs(expected)) if loose else 0.0
    if both_nan or expected == actual or abs(expected - actual) <= room:
        return None
    return Difference("values", where, describe(expected), describe(actual))


def sequence_difference(
    expected: Any, actual: Any, rtol: float, atol: float, where: str
) -> Difference | None:
    """Compare with a list or a tuple, item by item."""
    if not isinstance(actual, list | tuple):
        return Difference("type", where, kind_of(expected), kind_of(actual))
    if len(expected) != len(actual):
        sizes = (f"{len(x)} of them: {describe(x)}" for x in (expected, actual))
        return Difference("length", where, *sizes)
    for i, (x, y) in enumerate(zip(expected, actual, strict=True)):
        if found := difference(x, y, rtol, atol, f"{where}[{i}]"):
            plain = all(
                isinstance(z, str) or is_number(z) for z in (*expected, *actual)
            )
            if found.kind != "values" or not plain or len(expected) > 20:
                return found
            row = describe(expected), describe(actual)  # says more than one number
            return Difference("values", where, *row, f"the first that differs is [{i}]")
    return None


def mapping_difference(
    expected: dict[Any, Any], actual: Any, rtol: float, atol: float, where: str
) -> Difference | None:
    """Compare with a dictionary: its keys, then each value."""
    if not isinstance(actual, dict):
        return Difference("type", where, kind_of(expected), kind_of(actual))
    if expected.keys() != actual.keys():
        keys = (f"keys {list(x)}" for x in (expected, actual))
        return Difference("keys", where, *keys)
    for key, x in expected.items():
        if found := difference(x, actual[key], rtol, atol, f"{where}[{key!r}]"):
            return found
    return None
