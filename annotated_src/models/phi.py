"""Phi-2: attention and feed-forward side by side, behind one norm; biases everywhere.

Source: microsoft/phi-2; transformers `PhiForCausalLM`; GPT-J for the parallel sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from annotated_src.activations import gelu_tanh
from annotated_src.attention import Attention, Rotate
from annotated_src.embedding import TokenEmbedding
from annotated_src.feed_forward import FeedForward
from annotated_src.hf_sizes import (
    SIZE_KEYS,
    TINY_SIZES,
    expect,
    head_sizes,
    plain_rope_base,
    read_sizes,
    rotary_dim,
    weights_and_biases,
)
from annotated_src.kv_cache import LayerCache, new_caches
from annotated_src.norms import LayerNorm
from annotated_src.placement import place_causally
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables


@dataclass(frozen=True)
class PhiConfig:
    """Sizes. What the model does with them is in the code below."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # features of a head that turn, the first ones
    ffn_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "PhiConfig":
        """Read a checkpoint's config.json, as transformers 4 or 5 writes it.

        Raises:
            ValueError: a key is missing, or asks for what this model does not do.
        """
        expect(config, "Phi", "hidden_act", "gelu_new", "gelu_pytorch_tanh")
        expect(config, "Phi", "tie_word_embeddings", False)
        expect(config, "Phi", "qk_layernorm", False)
        heads = head_sizes(config)
        return cls(
            **read_sizes(cls, config, HF_KEYS),
            **heads,
            rotary_dim=rotary_dim(config, heads["head_dim"], default=0.5),
            rope_base=plain_rope_base(config),
        )


PHI_2 = PhiConfig(
    vocab_size=51_200,
    num_layers=32,
    embed_dim=2560,
    num_heads=32,
    num_kv_heads=32,
    head_dim=80,
    rotary_dim=32,
    ffn_dim=10_240,
    max_seq_len=2048,
    norm_eps=1e-5,
    rope_base=10_000.0,
)


def tiny_config() -> PhiConfig:
    """Shrink it to look at and to test with."""
    return replace(PHI_2, **{**TINY_SIZES, "head_dim": 12, "rotary_dim": 4})


class PhiBlock(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x)): in parallel, behind one norm."""

    def __init__(self, c: PhiConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(
            c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=True
        )
        self.ffn = FeedForward(c.embed_dim, c.ffn_dim, gelu_tanh)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        y = self.norm(x)
        # Bracketed as the original adds them: half precision rounds after each.
        return x + (self.attention(y, rotate, mask, cache) + self.ffn(y))


class Phi(nn.Module):
    """Token ids in, one score per vocabulary entry out, for every token."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(PhiBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size)

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
        return rope_frequencies(c.rotary_dim, c.rope_base, device)

    def score(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Give every entry of the vocabulary a score."""
        return self.lm_head(x)

    def new_cache(self, batch_size: int, max_seq_len: int) -> list[LayerCache]:
        """Make room for max_seq_len tokens a row, in the model's dtype and device."""
        return new_caches(self.config, batch_size, max_seq_len, self.embedding.weight)


HF_KEYS = {**SIZE_KEYS, "norm_eps": "layer_norm_eps"}
# Our name of each module, and Hugging Face's; {} is the layer.
_MODULES = {
    "embedding": "model.embed_tokens",
    "blocks.{}.norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out_proj": "model.layers.{}.self_attn.dense",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.fc1",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.fc2",
    "norm": "model.final_layernorm",
    "lm_head": "lm_head",
}
HF_NAMES = weights_and_biases(_MODULES)
