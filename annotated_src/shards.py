"""The files of a checkpoint: which they are, and the tensors in them."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# The newer format first; where a directory has both, they hold the same weights.
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = "{}.index.json"

Progress = Callable[[int, int], None]  # shards done, shards in all


class CheckpointError(ValueError):
    """The files and the model do not describe the same tensors."""


def find_file(directory: Path, name: str) -> Path | None:
    """Locate a file of the checkpoint, or return None when it is not there.

    It must lie in the directory, so that nobody's checkpoint reads somebody else's
    files: no `../x`, no absolute path, no link that leads out. Links from a snapshot
    of the Hugging Face hub's cache into the blobs of the same repository are fine.

    Raises:
        CheckpointError: it lies elsewhere, is no regular file, or cannot be looked at.
    """
    path, quoted = directory / name, f"{name!r:.100}"
    try:
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
        there, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise CheckpointError(f"{directory}: {quoted}: {error}") from error
    blobs = [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *blobs)):
        raise CheckpointError(f"{directory}: {quoted} leads out of the directory")
    if there and not regular:
        raise CheckpointError(f"{path}: not a regular file")
    return path if there else None


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is not a JSON object, or `find_file` refuses it.
    """
    if find_file(path.parent, path.name) is None:
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object down, a key a line."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shard_paths(directory: Path, only: Collection[str] = ()) -> list[Path]:
    """List the files that hold the weights: one, or those that an index names.

    With only, those that hold one of these tensors, if an index tells.

    Raises:
        FileNotFoundError: neither index nor single file.
        CheckpointError: the index names no files, or one that is not there or that
            `find_file` refuses.
    """
    for file in FILES:
        if find_file(directory, INDEX.format(file)):
            return _shards_of(directory / INDEX.format(file), only)
        if single := find_file(directory, file):
            return [single]
    raise FileNotFoundError(f"not in {directory}: {' or '.join(FILES)}")


def _shards_of(index: Path, only: Collection[str]) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(
            f"{index}: weight_map is {shards!r:.100}, not an object with entries"
        )
    for name, file in shards.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: {name!r} is in {file!r:.100}, not a file")
    files = sorted({shards[name] for name in only or shards if name in shards})
    found = {file: find_file(index.parent, file) for file in files}
    absent = ", ".join(file for file in files if found[file] is None)
    if absent:
        raise CheckpointError(f"{index}: not in {index.parent}: {absent}")
    return [path for path in found.values() if path is not None]


def read_tensors(
    directory: Path, only: Collection[str] = (), progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor at a time, shard by shard; keep none of them.

    Each has memory of its own: no other tensor's, and none that the file is mapped to.
    A .bin file must be read as a whole, and is let go as its tensors are. It is a
    pickle, which could run code; nothing but tensors is taken from it. With only, these
    tensors, as far as they exist.

    Raises:
        FileNotFoundError, CheckpointError: as `shard_paths`.
        CheckpointError: a file is damaged, or holds something other than tensors.
    """
    paths = shard_paths(directory, only)
    for done, path in enumerate(paths, start=1):
        read = _read_bin if path.suffix == ".bin" else _read_safetensors
        yield from read(path, only)
        if progress is not None:
            progress(done, len(paths))


def _read_safetensors(
    path: Path, only: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    try:
        # Mapped, which is the default, both the file and the model would be in memory.
        with safe_open(path, framework="pt", backend="pread") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is not a mapping
                if not only or name in only:
                    yield name, shard.get_tensor(name)
    except Exception as error:  # the library's own, the system's, or torch's
        raise CheckpointError(f"{path}: {error}") from error


def _read_bin(path: Path, only: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    try:
        with warnings.catch_warnings():  # a damaged file may look like an old one
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle, anything can come
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name!r:.100} does not name a plain tensor")
    uses = Counter(x.untyped_storage().data_ptr() for x in content.values())
    for name in only or list(content):
        if name in content:
            tensor = content.pop(name).detach()  # who takes it has the only reference
            storage = tensor.untyped_storage()
            alone = uses[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes
            del storage
            yield name, tensor.contiguous() if alone else tensor.clone()
            del tensor


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"  # the meta device has no numbers
        and value.layout == torch.strided
    )
