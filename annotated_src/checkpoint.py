"""Read a Hugging Face checkpoint: find the shards, rename, check every tensor."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from annotated_src.models import llama

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """The files and the model do not describe the same tensors."""


class Architecture(NamedTuple):
    """What `load_model` needs to know of a model file."""

    config: Any
    model: Any
    names: Mapping[str, str]


ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES),
}
"""Keyed by the `model_type` of config.json."""


def load_model(path: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Build the model that a directory describes, with its weights, ready to run.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        CheckpointError: an unknown model type, a damaged file, or tensors that are
            missing, unexpected or of another shape (all of them are named).
    """
    directory = Path(path)
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{directory}: model_type is {kind!r}, known are {known}")
    architecture = ARCHITECTURES[kind]
    # The meta device has shapes but no memory, so only one copy of the weights exists.
    with torch.device("meta"):
        model = architecture.model(architecture.config.from_hf(config))
    tensors = rename(read_tensors(directory), names_by_layer(model, architecture.names))
    assign_strictly(model, tensors, dtype)
    return model.eval()


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


def shard_paths(directory: Path) -> list[Path]:
    """List the files that hold the weights: one, or those that the index names.

    Raises:
        FileNotFoundError: neither index nor single file, or a shard is not there.
        CheckpointError: the index names no files.
    """
    index = directory / INDEX
    names = [SINGLE]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: weight_map is {shards!r}, not an object")
        names = sorted(set(shards.values()))
    absent = [name for name in names if not (directory / name).exists()]
    if absent:
        raise FileNotFoundError(f"not in {directory}: {', '.join(absent)}")
    return [directory / name for name in names]


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor at a time, so that two copies of the model never exist at once.

    Raises:
        CheckpointError: a file is truncated or is not safetensors.
    """
    for path in shard_paths(directory):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a shard is not a mapping
                    yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from error


def names_by_layer(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Map each name in the checkpoint to the model's, layer numbers filled in.

    Templates of tensors that the model does not have (a tied head) are left out.
    """
    num_layers = len(list(model.get_submodule("blocks").children()))
    expanded = {}
    for ours, theirs in names.items():
        for layer in range(num_layers) if "{}" in ours else (0,):
            expanded[theirs.format(layer)] = ours.format(layer)
    present = set(model.state_dict())
    return {theirs: ours for theirs, ours in expanded.items() if ours in present}


def rename(
    tensors: Iterable[tuple[str, Tensor]], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor our name; one that has none keeps its own.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    seen = set()
    for name, tensor in tensors:
        ours = names.get(name, name)
        if ours in seen:
            raise CheckpointError(f"a second tensor for {ours}: {name}")
        seen.add(ours)
        yield ours, tensor


def assign_strictly(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Put the tensors into the model, all or none.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    found = dict(tensors)
    problems = [f"missing: {name}" for name in wanted if name not in found]
    for name, tensor in found.items():
        if name not in wanted:
            problems.append(f"unexpected: {name}")
        elif tensor.shape != wanted[name].shape:
            problems.append(
                f"shape of {name}: checkpoint {tuple(tensor.shape)}, "
                f"model {tuple(wanted[name].shape)}"
            )
    if problems:
        raise CheckpointError("checkpoint and model differ\n  " + "\n  ".join(problems))
    for name in found:
        # A copy: what was read still lies in the file, which may be written to later.
        found[name] = found[name].to(dtype, copy=True)
    model.load_state_dict(found, assign=True)
