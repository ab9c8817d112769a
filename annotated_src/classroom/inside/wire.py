"""Plain data as JSON: what comes out of a student's process is decoded, never run."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

Stream = IO[bytes] | io.BufferedIOBase
LIMIT = 64 * 2**20
DEPTH = 30
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex128, torch.complex64, torch.bool, torch.uint8),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
    )
}


class Foreign:
    """Stands for an object that is no plain data, such as a module or a file."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"an object of type {self.kind}"


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Turn a value into what JSON can hold; what is no plain data becomes its name.

    Raises:
        ValueError: the value is too large, or nested too deeply.
    """
    if depth == 0:
        raise ValueError(f"nested more than {DEPTH} times")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), depth - 1)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        copy = np.ascontiguousarray(value).reshape(value.shape)
        told = plain_tensor(torch.from_numpy(copy))
        return {"array": told["tensor"]} if "tensor" in told else told
    if isinstance(value, Tensor):
        return plain_tensor(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        pairs = [[plain(k, depth - 1), plain(v, depth - 1)] for k, v in value.items()]
        return {"dict": pairs}
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [plain(item, depth - 1) for item in value]}
    for kind in (int, float, str):  # an IntEnum, say
        if isinstance(value, kind):
            return kind(value)
    return {"other": type(value).__name__[:80]}


COLLECTIONS: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def plain_tensor(tensor: Tensor) -> dict[str, Any]:
    """Turn a dense tensor into its dtype, its shape and its bytes."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or dtype not in DTYPES or tensor.is_meta:
        return {"other": f"Tensor ({dtype}, {tensor.layout}, {tensor.device})"}
    if tensor.numel() * tensor.element_size() > LIMIT // 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is too large")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    text = base64.b64encode(data).decode("ascii")
    return {"tensor": [dtype, list(tensor.shape), text]}


def value_of(tree: Any, depth: int = DEPTH) -> Any:
    """Turn decoded JSON back into the value that `plain` was given.

    Raises:
        ValueError: it is not what `plain` writes.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if depth == 0 or not isinstance(tree, dict) or len(tree) != 1:
        raise ValueError(f"no plain data: {str(tree)[:80]}")
    ((kind, held),) = tree.items()
    try:
        if kind == "tensor":
            return tensor_of(*held)
        if kind == "array":
            return tensor_of(*held).numpy()
        if kind == "bytes":
            return base64.b64decode(held, validate=True)
        if kind == "complex":
            return complex(*held)
        if kind == "other":
            return Foreign(str(held)[:200])
        if kind == "dict":
            return {value_of(k, depth - 1): value_of(v, depth - 1) for k, v in held}
        return COLLECTIONS[kind]([value_of(item, depth - 1) for item in held])
    except (TypeError, KeyError, RuntimeError, OverflowError) as problem:
        raise ValueError(f"no plain data: {str(tree)[:80]}") from problem


def tensor_of(dtype: str, shape: list[int], text: str) -> Tensor:
    """Make a tensor of its dtype, its shape and its bytes.

    Raises:
        ValueError: they do not fit each other.
    """
    data = bytearray(base64.b64decode(text, validate=True))
    kind = DTYPES[dtype]
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"no shape: {shape}")
    if len(data) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{len(data)} bytes are no {dtype} of shape {shape}")
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind).reshape(shape)


def write_frame(stream: Stream, data: bytes) -> None:
    """Write the length of a message, then the message."""
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def read_frame(stream: Stream) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other side is gone.
        ValueError: it is larger than any honest message.
    """
    head = stream.read(8)
    size = int.from_bytes(head, "big")
    if len(head) < 8:
        raise EOFError("the stream ended")
    if size > LIMIT:
        raise ValueError(f"a message of {size} bytes, {LIMIT} at most")
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the stream ended inside a message")
    return data


def dumps(message: dict[str, Any]) -> bytes:
    """Write a message as JSON."""
    return json.dumps(message).encode("ascii")


def loads(data: bytes) -> dict[str, Any]:
    """Read a message.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        message = json.loads(data)
    except RecursionError as problem:
        raise ValueError("a message nested too deeply") from problem
    if not isinstance(message, dict):
        raise ValueError(f"no message: {str(message)[:80]}")
    return message
