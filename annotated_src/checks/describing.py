"""Write values for people: what kind of thing, which shape, which numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def as_tensor(value: Any) -> Any:
    """Make a tensor of an array of numbers; all else stays what it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())  # torch wants no strides below 0
    return value


def kind_of(value: Any) -> str:
    """Name a value's type, and say a little of what it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a numpy array of shape {value.shape}"
    if value is None:
        return "None"
    return f"{type(value).__name__}: {describe(value)}"


def describe(value: Any, limit: int = 400) -> str:
    """Write a value for people: small tensors in full, large ones in outline."""
    if isinstance(tensor := as_tensor(value), Tensor):
        library = "" if tensor is value else "numpy "
        return library + describe_tensor(tensor)
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    arrays = Tensor | np.ndarray
    if isinstance(value, list | tuple) and any(isinstance(x, arrays) for x in value):
        return "\n".join(describe(x, limit) for x in value)
    if isinstance(value, dict) and any(isinstance(x, arrays) for x in value.values()):
        return "\n".join(f"{k!r}: {describe(x, limit)}" for k, x in value.items())
    text = getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]} …"


def describe_tensor(value: Tensor) -> str:
    """Write dtype, shape and numbers; a tensor on torch's meta device has none."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.is_meta:
        way = "without numbers" if value.is_meta else "sparse"
        return f"{kind} {tuple(value.shape)}, {way}"
    plain = value.detach().cpu()
    plain = plain.float() if plain.dtype == torch.bfloat16 else plain
    text = np.array2string(
        plain.numpy(), precision=4, threshold=48, edgeitems=2, separator=", "
    )
    text = text.replace("\n\n", "\n").replace("\n\n", "\n")
    return f"{kind} {tuple(value.shape)}\n{text}" if value.ndim else text
