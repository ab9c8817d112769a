"""Write config.json: undo what each model's `from_hf` reads.

The keys are those of transformers 4, which 5 reads as well. They stand apart from the
models, which need none of it to run.
"""

import math
from collections.abc import Mapping
from typing import Any

from annotated_src.models import chatglm, gemma, llama, phi

# Left out, they would be 1 and 2: words of the text in many vocabularies.
NO_IDS = {"bos_token_id": None, "eos_token_id": None}


def write_sizes(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """Undo `read_sizes` and `head_sizes`."""
    return {key: getattr(config, ours) for ours, key in keys.items()} | {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def write_llama(config: llama.LlamaConfig) -> dict[str, Any]:
    """Say a Llama's sizes in config.json's words."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **write_sizes(config, llama.HF_KEYS),
        "rope_theta": config.rope_base,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "hidden_act": "silu",
        **NO_IDS,
    }


def write_gemma(config: gemma.GemmaConfig) -> dict[str, Any]:
    """Say a Gemma's sizes in config.json's words."""
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **write_sizes(config, gemma.HF_KEYS),
        "rope_theta": config.rope_base,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        **NO_IDS,
    }


def write_phi(config: phi.PhiConfig) -> dict[str, Any]:
    """Say a Phi's sizes in config.json's words."""
    part = config.rotary_dim / config.head_dim
    # Who reads it takes the whole part of head_dim * part: it must not fall short.
    if int(config.head_dim * part) < config.rotary_dim:
        part = math.nextafter(part, 1)
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        **write_sizes(config, phi.HF_KEYS),
        "rope_theta": config.rope_base,
        "partial_rotary_factor": part,
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        **NO_IDS,
    }


def write_chatglm(config: chatglm.ChatGLMConfig) -> dict[str, Any]:
    """Say a ChatGLM's sizes and special ids in the words of its original."""
    blanks = dict(zip(chatglm.BLANKS, config.blank_ids, strict=True))
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "inner_hidden_size": config.ffn_dim,
        "max_sequence_length": config.max_seq_len,
        "layernorm_epsilon": config.norm_eps,
        **{f"{name}_token_id": number for name, number in blanks.items()},
        "position_encoding_2d": config.position_rows == 2,
        "pre_seq_len": config.prefix_len or None,
        "prefix_projection": config.prefix_projection,
        "tie_word_embeddings": config.tied_head,
    }
