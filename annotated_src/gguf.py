"""Read a GGUF file: its metadata, and its tensors, dequantised on request.

Layout: magic, version, two counts, key-value pairs, one descriptor per tensor, padding
to `general.alignment`, then the tensors' blocks. Everything is little-endian.
Source: ggml `docs/gguf.md` and `ggml-common.h`.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Value types, by number, as struct spells them; 8 and 9 have no fixed size.
SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", 10))
STRING, ARRAY = 8, 9
MAX_NESTING = 8
# The fewest bytes that one value takes: an array must leave room for all of its own.
SMALLEST = {kind: struct.calcsize(code) for kind, code in SCALARS.items()}
SMALLEST |= {STRING: 8, ARRAY: 12}


class GGUFError(ValueError):
    """The file is not a GGUF that can be read here."""


class Block(NamedTuple):
    """How one quantization stores a run of numbers."""

    name: str
    layout: np.dtype[Any]  # of one block
    length: int  # numbers in a block
    decode: Callable[[NDArray[Any]], NDArray[np.float32]]


def _decode_q4_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    # Byte i holds number i in its low half and number i + 16 in its high half.
    nibbles = np.concatenate((blocks["q"] & 15, blocks["q"] >> 4), axis=-1)
    scaled = blocks["scale"].astype(np.float32) * nibbles
    return scaled + blocks["min"].astype(np.float32)


def _decode_q8_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks["scale"].astype(np.float32) * blocks["q"].astype(np.float32)


BLOCKS = {
    0: Block("F32", np.dtype("<f4"), 1, lambda x: x.astype("f4")),
    1: Block("F16", np.dtype("<f2"), 1, lambda x: x.astype("f4")),
    3: Block(
        "Q4_1",
        np.dtype([("scale", "<f2", 1), ("min", "<f2", 1), ("q", "u1", 16)]),
        32,
        _decode_q4_1,
    ),
    8: Block(
        "Q8_0", np.dtype([("scale", "<f2", 1), ("q", "i1", 32)]), 32, _decode_q8_0
    ),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor, still packed, mapped from the file."""

    name: str
    shape: tuple[int, ...]  # torch's order: the last dimension is contiguous
    block: Block
    blocks: NDArray[Any]

    def dequantise(self) -> NDArray[np.float32]:
        """Unpack to float32: scale * q, plus the block's minimum where it has one."""
        return self.block.decode(self.blocks).reshape(self.shape)


@dataclass(frozen=True)
class GGUF:
    """What a file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Read forward through the bytes, and say where they end too early."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data.data, 0

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise GGUFError(
                f"truncated: {what} needs {count} bytes at byte {self.at}, "
                f"the file has {len(self.data)}"
            )

    def number(self, code: str) -> Any:
        self.need(struct.calcsize("<" + code), "a number")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.need(length, "a string")
        self.at += length
        raw = bytes(self.data[self.at - length : self.at])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"a string before byte {self.at}: {error}") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            if depth > MAX_NESTING:
                raise GGUFError(f"arrays nest deeper than {MAX_NESTING}")
            item, count = self.number("I"), self.number("Q")
            self.need(count * SMALLEST.get(item, 1), "an array")
            return [self.value(item, depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise GGUFError(f"unknown value type {kind} before byte {self.at}")
        return self.number(SCALARS[kind])


def read_gguf(path: Path | str) -> GGUF:
    """Read the metadata, and map the tensors without copying them.

    Raises:
        GGUFError: not GGUF, another version, truncated, or an unknown quantization.
    """
    size = Path(path).stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    cursor = _Cursor(data)
    if bytes(data[:4]) != MAGIC:
        raise GGUFError(f"{path}: starts with {bytes(data[:4])!r}, expected {MAGIC!r}")
    cursor.at = 4
    if (version := cursor.number("I")) not in VERSIONS:
        raise GGUFError(f"{path}: version {version}, expected one of {VERSIONS}")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    descriptors = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
        descriptors.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise GGUFError(
            f"{path}: general.alignment is {alignment!r}, expected 1 or more"
        )
    start = math.ceil(cursor.at / alignment) * alignment
    tensors = {d[0]: _map_tensor(cursor, start, *d) for d in descriptors}
    return GGUF(metadata, tensors)


def _map_tensor(
    cursor: _Cursor,
    start: int,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
) -> GGUFTensor:
    if kind not in BLOCKS:
        known = ", ".join(f"{k} ({b.name})" for k, b in BLOCKS.items())
        raise GGUFError(f"{name}: unknown quantization type {kind}, known are {known}")
    block = BLOCKS[kind]
    width = shape[-1] if shape else 1
    if width % block.length:
        raise GGUFError(
            f"{name}: rows of {width} numbers do not divide into "
            f"{block.name} blocks of {block.length}"
        )
    num_bytes = math.prod(shape) // block.length * block.layout.itemsize
    cursor.at = start + offset
    cursor.need(num_bytes, f"tensor {name}")
    raw = cursor.data[cursor.at : cursor.at + num_bytes]
    return GGUFTensor(name, shape, block, np.frombuffer(raw, block.layout))
