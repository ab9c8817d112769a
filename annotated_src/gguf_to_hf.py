"""Write a Llama in a GGUF file as a Hugging Face directory, in float32."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from annotated_src.gguf import GGUF, GGUFError, read_gguf
from annotated_src.models.llama import HF_NAMES
from annotated_src.rotary import rows_to_half_split
from annotated_src.shards import write_json

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
DIGITS_ONE_BY_ONE = ("smollm",)  # values of tokenizer.ggml.pre read here

# Ours to GGUF's, beside HF_NAMES: ours to Hugging Face's.
GGUF_NAMES = {
    "embedding.weight": "token_embd.weight",
    "blocks.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "blocks.{}.attention.q_proj.weight": "blk.{}.attn_q.weight",
    "blocks.{}.attention.k_proj.weight": "blk.{}.attn_k.weight",
    "blocks.{}.attention.v_proj.weight": "blk.{}.attn_v.weight",
    "blocks.{}.attention.out_proj.weight": "blk.{}.attn_output.weight",
    "blocks.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
    "blocks.{}.ffn.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "blocks.{}.ffn.up_proj.weight": "blk.{}.ffn_up.weight",
    "blocks.{}.ffn.down_proj.weight": "blk.{}.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def convert_gguf(
    gguf_path: Path, directory: Path, progress: Callable[[str], None]
) -> None:
    """Write FILES into a new directory.

    Raises:
        GGUFError: the file cannot be read, holds another architecture, or has a tensor
            without a name here.
    """
    gguf = read_gguf(gguf_path)
    kind = gguf.metadata.get("general.architecture")
    if kind != "llama":
        raise GGUFError(f"{gguf_path.name}: architecture {kind!r}, expected 'llama'")
    m = gguf.metadata
    try:
        config, tokenizer_config = hf_config(m), hf_tokenizer_config(m)
        config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
        tokenizer, template = tokenizer_from_gguf(m), m["tokenizer.chat_template"]
    except KeyError as key:
        raise GGUFError(f"{gguf_path.name}: no {key} in its metadata") from key
    tensors = dict(_hf_tensors(gguf, progress))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    (directory / "chat_template.jinja").write_text(template, "utf-8")
    write_json(directory / "config.json", config)


def hf_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Say in config.json's words what the metadata says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": len(m["tokenizer.ggml.tokens"]),
        "num_hidden_layers": m["llama.block_count"],
        "hidden_size": m["llama.embedding_length"],
        "num_attention_heads": m["llama.attention.head_count"],
        "num_key_value_heads": m["llama.attention.head_count_kv"],
        "intermediate_size": m["llama.feed_forward_length"],
        "max_position_embeddings": m["llama.context_length"],
        # Stored as float32, which is not quite the decimal that was meant.
        "rms_norm_eps": float(f"{m['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": m["llama.rope.freq_base"],
        "hidden_act": "silu",
        "bos_token_id": m["tokenizer.ggml.bos_token_id"],
        "eos_token_id": m["tokenizer.ggml.eos_token_id"],
        "pad_token_id": m["tokenizer.ggml.padding_token_id"],
    }


def hf_tokenizer_config(m: Mapping[str, Any]) -> dict[str, str]:
    """Name the special tokens as tokenizer_config.json does."""
    tokens = m["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {
        f"{role}_token": tokens[m[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in roles.items()
    }
    return named | {"tokenizer_class": "PreTrainedTokenizerFast"}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the byte-level BPE tokenizer that a GGUF file's metadata describes.

    Raises:
        ValueError: another kind of tokenizer.

    Source: ggml `docs/gguf.md`, tokenizer; llama.cpp `LLAMA_VOCAB_PRE_TYPE_SMOLLM`.
    """
    model, pre = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if model != "gpt2" or pre not in DIGITS_ONE_BY_ONE:
        raise ValueError(
            f"tokenizer is {model!r} with pre-tokenizer {pre!r}, "
            f"expected 'gpt2' with one of {DIGITS_ONE_BY_ONE}"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _hf_tensors(
    gguf: GGUF, progress: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    names = {theirs: HF_NAMES[ours] for ours, theirs in GGUF_NAMES.items()}
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    for i, (name, packed) in enumerate(gguf.tensors.items(), 1):
        parts = name.split(".")
        layer, template = "0", name
        if parts[0] == "blk":
            layer, template = parts[1], ".".join(("blk", "{}", *parts[2:]))
        if template not in names:
            raise GGUFError(f"no name here for the GGUF tensor {name}")
        tensor = torch.from_numpy(packed.dequantise())
        # GGUF pairs features 2i and 2i + 1, Hugging Face i and i + R.
        if parts[-2] in heads:
            tensor = rows_to_half_split(tensor, heads[parts[-2]])
        yield names[template].format(layer), tensor.contiguous()
        if i % 50 == 0 or i == len(gguf.tensors):
            progress(f"  {i} of {len(gguf.tensors)} tensors")
