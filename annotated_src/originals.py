"""Names and sizes in files that are older than their Hugging Face form.

Phi-2 first came with one matrix for queries, keys and values, and words of its own in
config.json. Meta's Llamas have other names, and rows in the order of interleaved RoPE.

Source: the files of microsoft/phi-2 of December 2023, transformers 4
`convert_phi_weights_to_hf.py`; Meta's llama `model.py`, transformers 4
`convert_llama_weights_to_hf.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from annotated_src.hf_sizes import expect, head_sizes, read_sizes, weights_and_biases
from annotated_src.models.llama import LlamaConfig
from annotated_src.models.phi import PhiConfig
from annotated_src.rotary import rows_to_half_split

PHI_MSFT_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "embed_dim": "n_embd",
    "num_heads": "n_head",
    "max_seq_len": "n_positions",
    "rotary_dim": "rotary_dim",
    "norm_eps": "layer_norm_epsilon",
}
PHI_MSFT_NAMES = weights_and_biases(
    {
        "embedding": "transformer.embd.wte",
        "blocks.{}.norm": "transformer.h.{}.ln",
        "blocks.{}.attention.qkv_proj": "transformer.h.{}.mixer.Wqkv",
        "blocks.{}.attention.out_proj": "transformer.h.{}.mixer.out_proj",
        "blocks.{}.ffn.up_proj": "transformer.h.{}.mlp.fc1",
        "blocks.{}.ffn.down_proj": "transformer.h.{}.mlp.fc2",
        "norm": "lm_head.ln",
        "lm_head": "lm_head.linear",
    }
)
"""The rows of Wqkv lie plainly: all queries, all keys, all values."""

META_LLAMA_NAMES = weights_and_biases(
    {
        "embedding": "tok_embeddings",
        "blocks.{}.attention_norm": "layers.{}.attention_norm",
        "blocks.{}.attention.q_proj": "layers.{}.attention.wq",
        "blocks.{}.attention.k_proj": "layers.{}.attention.wk",
        "blocks.{}.attention.v_proj": "layers.{}.attention.wv",
        "blocks.{}.attention.out_proj": "layers.{}.attention.wo",
        "blocks.{}.ffn_norm": "layers.{}.ffn_norm",
        "blocks.{}.ffn.gate_proj": "layers.{}.feed_forward.w1",
        "blocks.{}.ffn.up_proj": "layers.{}.feed_forward.w3",
        "blocks.{}.ffn.down_proj": "layers.{}.feed_forward.w2",
        "norm": "norm",
        "lm_head": "output",
    }
)
"""Queries and keys go through `turn_meta_rows` on their way."""


def read_phi_msft(config: Mapping[str, Any]) -> PhiConfig:
    """Read the config.json of the first Phi-2.

    Raises:
        ValueError: a key is missing, or asks for what this model does not do.
    """
    expect(config, "Phi", "activation_function", "gelu_new")
    expect(config, "Phi", "tie_word_embeddings", False)
    sizes = read_sizes(PhiConfig, config, PHI_MSFT_KEYS)
    heads = {
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": config.get("n_head_kv"),
        "hidden_size": sizes["embed_dim"],
    }
    sizes |= head_sizes(heads)
    if sizes["rotary_dim"] not in range(2, sizes["head_dim"] + 1, 2):
        raise ValueError(
            f"rotary_dim must be even, from 2 to the {sizes['head_dim']} features of a "
            f"head, got {sizes['rotary_dim']}"
        )
    inner = config.get("n_inner") or 4 * sizes["embed_dim"]
    return PhiConfig(**sizes, ffn_dim=inner, rope_base=10_000.0)


def write_phi_msft(config: PhiConfig) -> dict[str, Any]:
    """Undo `read_phi_msft`.

    Raises:
        ValueError: heads of another width, or another RoPE, which it cannot say.
    """
    c = config
    if c.num_heads * c.head_dim != c.embed_dim or c.rope_base != 10_000:
        raise ValueError(
            f"model_type 'phi-msft' has heads as wide as the model, and a RoPE of base "
            f"10000; got {c.num_heads} heads of {c.head_dim} for a width of "
            f"{c.embed_dim}, and base {c.rope_base}"
        )
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi-msft",
        **{key: getattr(c, ours) for ours, key in PHI_MSFT_KEYS.items()},
        "n_head_kv": c.num_kv_heads,
        "n_inner": c.ffn_dim,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    }


def turn_meta_rows(
    tensors: Iterable[tuple[str, Tensor]], config: LlamaConfig
) -> Iterator[tuple[str, Tensor]]:
    """Reorder the rows of queries and keys, by our names, from pairs side by side.

    Raises:
        ValueError: rows that are not the config's heads.
    """
    heads = {".q_proj.weight": config.num_heads, ".k_proj.weight": config.num_kv_heads}
    for name, tensor in tensors:
        count = next((n for end, n in heads.items() if name.endswith(end)), 0)
        if count and tensor.shape[0] != count * config.head_dim:
            raise ValueError(
                f"{name} has {tensor.shape[0]} rows, not those of {count} heads of "
                f"{config.head_dim}"
            )
        yield name, rows_to_half_split(tensor, count) if count else tensor
