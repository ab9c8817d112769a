"""Llama: the plain decoder that later models vary. Also TinyLlama and SmolLM2.

Source: Touvron et al. 2023, section 2.2; transformers `LlamaForCausalLM`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.activations import silu
from annotated_src.attention import Attention, Rotate
from annotated_src.embedding import TokenEmbedding
from annotated_src.feed_forward import GatedFeedForward
from annotated_src.kv_cache import LayerCache, cached_length
from annotated_src.masks import causal_mask, padded_causal_mask
from annotated_src.norms import RMSNorm
from annotated_src.positions import padded_positions, positions_after
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables


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
    tied_head: bool  # one matrix serves as the embedding and as the head

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a checkpoint's config.json, as transformers 4 or 5 writes it.

        Raises:
            ValueError: a key is missing, or asks for what this model does not do.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        for key, found, wanted in (
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("rope type", rope_type, "default"),
            ("attention_bias", config.get("attention_bias", False), False),
            ("mlp_bias", config.get("mlp_bias", False), False),
        ):
            if found != wanted:
                raise ValueError(
                    f"config.json: {key} is {found!r}, this Llama has {wanted!r}"
                )
        try:
            num_heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                num_layers=config["num_hidden_layers"],
                embed_dim=config["hidden_size"],
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
                ffn_dim=config["intermediate_size"],
                max_seq_len=config["max_position_embeddings"],
                norm_eps=float(config["rms_norm_eps"]),
                rope_base=float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
                tied_head=config.get("tie_word_embeddings", False),
            )
        except KeyError as key:
            raise ValueError(f"config.json has no {key}") from key


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm, twice."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(
            c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=False
        )
        self.ffn_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.ffn = GatedFeedForward(c.embed_dim, c.ffn_dim, silu)

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
    ) -> Float[Tensor, "B T V"]:
        """Score the next token after each token given; append them to the cache.

        is_token is False at left padding, over the cache and this call.

        Raises:
            ValueError: an id outside the vocabulary, a cache without room or not one
                per block, or an is_token of another shape.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"{len(cache)} caches for {len(self.blocks)} blocks")
        x = self.embedding(tokens)
        num_tokens, num_cached = tokens.shape[1], cached_length(cache)
        if is_token is None:
            positions = positions_after(num_cached, num_tokens, tokens.device)
            mask = causal_mask(num_tokens, num_cached, tokens.device)
        else:
            covered = (tokens.shape[0], num_cached + num_tokens)
            if is_token.shape != covered:
                raise ValueError(
                    f"is_token must be (B, S) = {covered}, got {tuple(is_token.shape)}"
                )
            positions = padded_positions(is_token)[:, num_cached:]
            mask = padded_causal_mask(is_token, num_tokens)
        c = self.config
        frequencies = rope_frequencies(c.head_dim, c.rope_base, x.device)
        cos, sin = rope_tables(positions, frequencies, x.dtype)
        rotate = partial(apply_rotary, cos=cos, sin=sin)
        for i, block in enumerate(self.blocks):
            x = block(x, rotate, mask, cache[i] if cache is not None else None)
        head = self.embedding if c.tied_head else self.lm_head
        return F.linear(self.norm(x), head.weight)

    def new_cache(self, batch_size: int, max_seq_len: int) -> list[LayerCache]:
        """Make room for max_seq_len tokens a row, in the model's dtype and device."""
        c, weight = self.config, self.embedding.weight
        size = (batch_size, c.num_kv_heads, max_seq_len, c.head_dim)
        return [LayerCache(*size, weight.dtype, weight.device) for _ in self.blocks]


# Our name of each tensor, and Hugging Face's; {} is the layer.
HF_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.out_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    # It follows attention, hence Hugging Face's name; it feeds the MLP, hence ours.
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.ffn.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
