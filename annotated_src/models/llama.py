"""Llama: the plain decoder that later models vary. Also TinyLlama and SmolLM2.

Source: Touvron et al. 2023, section 2.2; transformers `LlamaForCausalLM`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.activations import silu
from annotated_src.attention import Attention, Rotate
from annotated_src.embedding import TokenEmbedding
from annotated_src.feed_forward import GatedFeedForward
from annotated_src.hf_sizes import (
    SIZE_KEYS,
    TINY_SIZES,
    expect,
    head_sizes,
    read_sizes,
    rope_section,
    weights_and_biases,
)
from annotated_src.kv_cache import LayerCache, new_caches
from annotated_src.norms import RMSNorm
from annotated_src.placement import place_causally
from annotated_src.rotary import (
    Llama3Scaling,
    apply_rotary,
    rope_frequencies,
    rope_tables,
    scale_frequencies,
)


@dataclass(frozen=True)
class LlamaConfig:
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
    tied_head: bool = False  # one matrix serves as the embedding and as the head
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Llama3Scaling | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a checkpoint's config.json, as transformers 4 or 5 writes it.

        Raises:
            ValueError: a key is missing, or asks for what this model does not do.
        """
        expect(config, "Llama", "hidden_act", "silu")
        rope = rope_section(config)
        return cls(
            **read_sizes(cls, config, HF_KEYS),
            **head_sizes(config),
            rope_base=float(rope.get("rope_theta", 1e4)),
            rope_scaling=Llama3Scaling.from_hf(rope),
        )


TINYLLAMA_1_1B = LlamaConfig(
    vocab_size=32_000,
    num_layers=22,
    embed_dim=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    ffn_dim=5632,
    max_seq_len=2048,
    norm_eps=1e-5,
    rope_base=10_000.0,
)


def tiny_config() -> LlamaConfig:
    """Shrink it to look at and to test with."""
    return replace(TINYLLAMA_1_1B, **TINY_SIZES)


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm, twice."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(
            c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.attention_bias
        )
        self.ffn_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.ffn = GatedFeedForward(c.embed_dim, c.ffn_dim, silu, c.mlp_bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x), rotate, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """Token ids in, one score per vocabulary entry out, for every token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(
            LlamaBlock(config) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)

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
        frequencies = rope_frequencies(c.head_dim, c.rope_base, device)
        return scale_frequencies(frequencies, c.rope_scaling)

    def score(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Give every entry of the vocabulary a score; a tied head is the embedding."""
        if self.config.tied_head:
            return F.linear(x, self.embedding.weight)
        return self.lm_head(x)

    def new_cache(self, batch_size: int, max_seq_len: int) -> list[LayerCache]:
        """Make room for max_seq_len tokens a row, in the model's dtype and device."""
        return new_caches(self.config, batch_size, max_seq_len, self.embedding.weight)


HF_KEYS = {
    **SIZE_KEYS,
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
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
    "lm_head": "lm_head",
}
HF_NAMES = weights_and_biases(_MODULES)
