"""Gemma: Llama with a scaled embedding, gains of 1 + weight, and a GELU in its gate.

Source: Gemma Team 2024, section 2; transformers `GemmaForCausalLM`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.activations import gelu_tanh
from annotated_src.attention import Attention, Rotate
from annotated_src.embedding import ScaledEmbedding
from annotated_src.feed_forward import GatedFeedForward
from annotated_src.hf_sizes import (
    SIZE_KEYS,
    TINY_SIZES,
    expect,
    head_sizes,
    plain_rope_base,
    read_sizes,
    weights_and_biases,
)
from annotated_src.kv_cache import LayerCache, new_caches
from annotated_src.norms import GemmaRMSNorm
from annotated_src.placement import place_causally
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes. What the model does with them is in the code below."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        """Read a checkpoint's config.json, as transformers 4 or 5 writes it.

        Raises:
            ValueError: a key is missing, or asks for what this model does not do.
        """
        # The first Gemmas say gelu, and were trained with its approximation by tanh.
        expect(config, "Gemma", "hidden_act", "gelu_pytorch_tanh", "gelu")
        expect(config, "Gemma", "hidden_activation", "gelu_pytorch_tanh", None)
        expect(config, "Gemma", "tie_word_embeddings", True)
        expect(config, "Gemma", "attention_bias", False)
        expect(config, "Gemma", "use_bidirectional_attention", None, False)
        return cls(
            **read_sizes(cls, config, HF_KEYS),
            **head_sizes(config),
            rope_base=plain_rope_base(config),
        )


GEMMA_2B = GemmaConfig(
    vocab_size=256_000,
    num_layers=18,
    embed_dim=2048,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    ffn_dim=16_384,
    max_seq_len=8192,
    norm_eps=1e-6,
    rope_base=10_000.0,
)
GEMMA_7B = replace(
    GEMMA_2B,
    num_layers=28,
    embed_dim=3072,
    num_heads=16,  # 16 heads of 256 are wider than the model
    num_kv_heads=16,
    ffn_dim=24_576,
)


def tiny_config() -> GemmaConfig:
    """Shrink it to look at and to test with."""
    return replace(GEMMA_2B, **{**TINY_SIZES, "num_kv_heads": 1})


class GemmaBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm, twice."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.attention_norm = GemmaRMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(
            c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=False
        )
        self.ffn_norm = GemmaRMSNorm(c.embed_dim, c.norm_eps)
        self.ffn = GatedFeedForward(c.embed_dim, c.ffn_dim, gelu_tanh)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x), rotate, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Gemma(nn.Module):
    """Token ids in, one score per vocabulary entry out, for every token."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = ScaledEmbedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(
            GemmaBlock(config) for _ in range(config.num_layers)
        )
        self.norm = GemmaRMSNorm(config.embed_dim, config.norm_eps)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: Sequence[LayerCache] | None = None,
        is_token: Bool[Tensor, "B S"] | None = None,
        last_logits_only: bool = False,
    ) -> Float[Tensor, "B #T V"]:
        """Score the next token after each token given; append them to the cache.

        is_token is False at left padding, over the cache and this call. With
        last_logits_only, only the last token's scores are computed: (B, 1, V).

        Raises:
            ValueError: an id outside the vocabulary, a cache without room or not one
                per block, or an is_token of another shape.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"{len(cache)} caches for {len(self.blocks)} blocks")
        x = self.embedding(tokens)
        positions, mask = place_causally(tokens, cache, is_token)
        cos, sin = rope_tables(positions, self.frequencies(), x.dtype)
        rotate = partial(apply_rotary, cos=cos, sin=sin)
        for i, block in enumerate(self.blocks):
            x = block(x, rotate, mask, cache[i] if cache is not None else None)
        return self.score(self.norm(x[:, -1:] if last_logits_only else x))

    def frequencies(self) -> Float[Tensor, "R"]:
        """Radians that each pair of a head turns per position."""
        c, device = self.config, self.embedding.weight.device
        return rope_frequencies(c.head_dim, c.rope_base, device)

    def score(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Give every entry of the vocabulary a score: the head is the embedding."""
        return F.linear(x, self.embedding.weight)

    def new_cache(self, batch_size: int, max_seq_len: int) -> list[LayerCache]:
        """Make room for max_seq_len tokens a row, in the model's dtype and device."""
        return new_caches(self.config, batch_size, max_seq_len, self.embedding.weight)


HF_KEYS = {**SIZE_KEYS, "norm_eps": "rms_norm_eps"}
# Our name of each module, and Hugging Face's; {} is the layer.
_MODULES = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out_proj": "model.layers.{}.self_attn.o_proj",
    # It follows attention, hence Hugging Face's name; it feeds the MLP, hence ours.
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
}
HF_NAMES = weights_and_biases(_MODULES)
