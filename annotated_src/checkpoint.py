"""Make a model of a checkpoint: rename its tensors, check every one, put them in."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from annotated_src.models import chatglm, llama
from annotated_src.quantize import quantize_linears
from annotated_src.shards import CheckpointError, read_json, read_tensors


class Architecture(NamedTuple):
    """What `load_model` needs to know of a model file."""

    config: Any
    model: Any
    names: Mapping[str, str]
    ignored: tuple[str, ...] = ()  # ends of names; not read if the model lacks them
    # Stored names of embedding and head, where config.json may leave open whether they
    # are one matrix: then they are, unless two different ones are stored.
    embedding_and_head: Collection[str] = ()


ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES),
    "chatglm": Architecture(
        chatglm.ChatGLMConfig,
        chatglm.ChatGLM,
        chatglm.HF_NAMES,
        ignored=chatglm.IGNORED,
        embedding_and_head=("transformer.word_embeddings.weight", "lm_head.weight"),
    ),
}
"""Keyed by the `model_type` of config.json."""


def load_model(path: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Build the model that a directory describes, with its weights, ready to run.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        CheckpointError: an unknown model type, a config that lacks a key or asks for
            what the model does not do, a damaged file, or tensors that are missing,
            unexpected or of another shape (all of them are named).
    """
    directory = Path(path)
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{directory}: model_type is {kind!r}, known are {known}")
    architecture = ARCHITECTURES[kind]
    model = _without_weights(architecture, config, directory)
    names = names_by_layer(model, architecture.names)
    stored = (
        (name, tensor)
        for name, tensor in read_tensors(directory)
        if name in names or not name.endswith(architecture.ignored)
    )
    assign_strictly(model, rename(stored, names), dtype)
    return model.eval()


def _without_weights(
    architecture: Architecture, config: dict[str, Any], directory: Path
) -> nn.Module:
    pair, bits = architecture.embedding_and_head, config.get("quantization_bit")
    if pair and "tie_word_embeddings" not in config:
        config["tie_word_embeddings"] = _are_one(directory, pair)
    try:
        # The meta device has shapes but no memory: only one copy of the weights exists.
        with torch.device("meta"):
            model = architecture.model(architecture.config.from_hf(config))
            return quantize_linears(model, bits) if bits else model
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _are_one(directory: Path, names: Collection[str]) -> bool:
    found = [tensor for _, tensor in read_tensors(directory, only=names)]
    return len(found) < 2 or torch.equal(*found)


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
    buffers = dict(model.named_buffers())  # quantised weights: they keep their dtype
    for name in found:
        kind = buffers[name].dtype if name in buffers else dtype
        # A copy: what was read still lies in the file, which may be written to later.
        found[name] = found[name].to(kind, copy=True)
    model.load_state_dict(found, assign=True)
