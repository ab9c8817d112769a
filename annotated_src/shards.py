"""The files of a checkpoint: which they are, and the tensors in them."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# The newer format first; where a directory has both, they hold the same weights.
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = "{}.index.json"


class CheckpointError(ValueError):
    """The files and the model do not describe the same tensors."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is not a JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def shard_paths(directory: Path, only: Collection[str] = ()) -> list[Path]:
    """List the files that hold the weights: one, or those that an index names.

    With only, those that hold one of these tensors, if an index tells.

    Raises:
        FileNotFoundError: neither index nor single file, or a shard is not there.
        CheckpointError: the index names no files.
    """
    for file in FILES:
        index = directory / INDEX.format(file)
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(
                    f"{index}: weight_map is {shards!r}, not an object"
                )
            files = {shards[name] for name in only or shards if name in shards}
            break
        if (directory / file).exists():
            files = {file}
            break
    else:
        raise FileNotFoundError(f"not in {directory}: {' or '.join(FILES)}")
    absent = sorted(name for name in files if not (directory / name).exists())
    if absent:
        raise FileNotFoundError(f"not in {directory}: {', '.join(absent)}")
    return [directory / name for name in sorted(files)]


def read_tensors(
    directory: Path, only: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor at a time, so that two copies of the model never exist at once.

    With only, these tensors, as far as they exist. A .bin file is a pickle, which could
    run code; nothing but tensors is taken from it.

    Raises:
        CheckpointError: a file is damaged, or holds something other than tensors.
    """
    for path in shard_paths(directory, only):
        read = _read_bin if path.suffix == ".bin" else _read_safetensors
        yield from read(path, only)


def _read_safetensors(
    path: Path, only: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is not a mapping
                if not only or name in only:
                    yield name, shard.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_bin(path: Path, only: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle, anything can come
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} does not name a tensor")
        if not only or name in only:
            yield name, tensor
