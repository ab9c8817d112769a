"""Write a model to disk, as Hugging Face directories have it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from annotated_src.architectures import ARCHITECTURES, Architecture
from annotated_src.shards import INDEX, write_json
from annotated_src.tensor_names import join_fused, names_by_layer

FILE = "model.safetensors"
SHARD = "model-{:05}-of-{:05}.safetensors"
CONFIG = "config.json"
# All that an earlier save may have left, and that a reader could mistake for this one.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_checkpoint(
    model: nn.Module,
    directory: Path | str,
    max_shard_bytes: int = 5 * 10**9,
    eos_id: int | None = None,
    model_type: str | None = None,
) -> None:
    """Write config.json and weights; `load_model` and transformers read them back.

    eos_id is the id at which a text ends: transformers stops there unasked. model_type
    says in whose form, where there are several: "phi-msft" fuses the queries, keys and
    values of a Phi again.

    Raises:
        ValueError: a model or model_type that is not in `ARCHITECTURES`, a tensor that
            such a checkpoint does not have (a quantised weight), tensors of several
            dtypes, or what `write_checkpoint` refuses.

    Source: transformers `PreTrainedModel.save_pretrained`.
    """
    architecture = _architecture_of(model, model_type)
    state = model.state_dict()
    if architecture.fused:
        state = join_fused(model, architecture.fused)
    theirs = {b: a for a, b in names_by_layer(model, architecture.names).items()}
    strange = [name for name in state if name not in theirs]
    if strange:
        raise ValueError(f"no name in a checkpoint for {', '.join(strange)}")
    dtypes = sorted({str(tensor.dtype).split(".")[1] for tensor in state.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the model has weights of several dtypes: {dtypes}")
    config = {**architecture.to_hf(model.config), "torch_dtype": dtypes[0]}
    weights = {theirs[name]: tensor for name, tensor in state.items()}
    write_checkpoint(
        directory, {**config, "eos_token_id": eos_id}, weights, max_shard_bytes
    )


def _architecture_of(model: nn.Module, model_type: str | None) -> Architecture:
    forms = {k: a for k, a in ARCHITECTURES.items() if type(model) is a.model}
    if not forms:
        known = sorted({a.model.__name__ for a in ARCHITECTURES.values()})
        raise ValueError(f"cannot save {type(model).__name__}, only {', '.join(known)}")
    if model_type is not None and model_type not in forms:
        raise ValueError(
            f"model_type of {type(model).__name__} is one of {', '.join(forms)}, "
            f"got {model_type!r}"
        )
    return forms[model_type or next(iter(forms))]


def write_checkpoint(
    directory: Path | str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors, by their names in a checkpoint, and the config beside them.

    One file, or shards of at most max_shard_bytes (a larger tensor has one to itself)
    and an index. Everything is written aside first; what an earlier save left goes only
    then. config.json is taken away first and put back last, so a directory that has
    one is complete.

    Raises:
        ValueError: directory is a file, max_shard_bytes is below 1, there are no
            weights, or they are on the meta device.
    """
    directory = Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be 1 or more, got {max_shard_bytes}")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory")
    empty = [name for name, tensor in weights.items() if tensor.is_meta]
    if empty or not weights:
        raise ValueError(f"no numbers to save in {', '.join(empty) or 'no tensors'}")
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=directory) as name:
        aside = Path(name)
        files = _write_weights(aside, weights, max_shard_bytes)
        write_json(aside / CONFIG, config)
        (directory / CONFIG).unlink(missing_ok=True)
        for old in directory.iterdir():
            if WEIGHTS.fullmatch(old.name):
                old.unlink()
        for file in (*files, CONFIG):
            (aside / file).replace(directory / file)


def _write_weights(
    directory: Path, weights: Mapping[str, Tensor], max_bytes: int
) -> list[str]:
    """Return the names of the files, the index last."""
    shards = list(_shards(weights, max_bytes))
    files = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    if len(shards) == 1:
        files = [FILE]
    for file, names in zip(files, shards, strict=True):
        shard = {name: weights[name].detach().cpu().contiguous() for name in names}
        save_file(shard, directory / file, {"format": "pt"})
    if len(shards) == 1:
        return files
    places = {
        name: file for file, names in zip(files, shards, strict=True) for name in names
    }
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(directory / INDEX.format(FILE), index)
    return [*files, INDEX.format(FILE)]


def _shards(weights: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """Fill one shard after the other, in the order of the tensors."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        if names and size + tensor.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
