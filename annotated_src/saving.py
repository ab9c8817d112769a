"""Write a Llama to disk, as Hugging Face directories have it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from annotated_src.checkpoint import names_by_layer
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.shards import INDEX, write_json

FILE = "model.safetensors"
SHARD = "model-{:05}-of-{:05}.safetensors"
CONFIG = "config.json"
# All that an earlier save may have left, and that a reader could mistake for this one.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_model(
    model: Llama,
    directory: Path | str,
    max_shard_bytes: int = 5 * 10**9,
    eos_id: int | None = None,
) -> None:
    """Write config.json and weights; `load_model` and transformers read them back.

    eos_id is the id at which a text ends: transformers stops there unasked.

    Raises:
        ValueError: a tensor that a Llama in a checkpoint does not have (a quantised
            weight), tensors of several dtypes, or what `write_checkpoint` refuses.

    Source: transformers `PreTrainedModel.save_pretrained`.
    """
    state = model.state_dict()
    names = names_by_layer(model, HF_NAMES)
    theirs = {ours: name for name, ours in names.items()}
    strange = [name for name in state if name not in theirs]
    if strange:
        raise ValueError(f"no name in a checkpoint for {', '.join(strange)}")
    dtypes = sorted({str(tensor.dtype).split(".")[1] for tensor in state.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the model has weights of several dtypes: {dtypes}")
    config = {**hf_config(model.config), "torch_dtype": dtypes[0]}
    weights = {theirs[name]: tensor for name, tensor in state.items()}
    write_checkpoint(
        directory, {**config, "eos_token_id": eos_id}, weights, max_shard_bytes
    )


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """Say a Llama's sizes in config.json's words: undo `LlamaConfig.from_hf`.

    The keys are those of transformers 4, which 5 reads as well.
    """
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        # Left out, they would be 1 and 2: words of the text in many vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
    }


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
