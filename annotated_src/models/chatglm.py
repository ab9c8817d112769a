"""ChatGLM-6B: it reads a text with a blank both ways, then writes what fills the blank.

Source: Du et al. 2022 (GLM); THUDM/chatglm-6b `modeling_chatglm.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.activations import gelu_tanh
from annotated_src.answer_cache import AnswerCache
from annotated_src.attention import Rotate
from annotated_src.attention_by_layer import FusedAttention
from annotated_src.embedding import TokenEmbedding
from annotated_src.feed_forward import FeedForward
from annotated_src.kv_cache import LayerCache
from annotated_src.norms import LayerNorm
from annotated_src.positions import BlankIds
from annotated_src.prefix_tuning import PrefixEncoder
from annotated_src.rotary_2d import rotation

# 28 is the depth of the 6B model; the original's blocks hear of no other.
ALPHA = math.sqrt(2 * 28)
BLANKS = ("bos", "gmask", "mask")


@dataclass(frozen=True)
class ChatGLMConfig:
    """Sizes and special ids. What the model does with them is in the code below."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float
    blank_ids: BlankIds
    position_rows: int = 2  # numbers a token gets
    prefix_len: int = 0  # P-tuning's tokens; 0 without
    prefix_projection: bool = False
    tied_head: bool = True  # one matrix serves as the embedding and as the head

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ChatGLMConfig":
        """Read a checkpoint's config.json, with the original's keys.

        Raises:
            ValueError: a key is missing, or sizes do not fit together.
        """
        try:
            read = cls(
                vocab_size=config["vocab_size"],
                num_layers=config["num_layers"],
                embed_dim=config["hidden_size"],
                num_heads=config["num_attention_heads"],
                ffn_dim=config["inner_hidden_size"] or 4 * config["hidden_size"],
                max_seq_len=config["max_sequence_length"],
                norm_eps=float(config["layernorm_epsilon"]),
                blank_ids=BlankIds(*(config[f"{x}_token_id"] for x in BLANKS)),
                position_rows=2 if config.get("position_encoding_2d", True) else 1,
                prefix_len=config.get("pre_seq_len") or 0,
                prefix_projection=config.get("prefix_projection", False),
                tied_head=config.get("tie_word_embeddings", True),
            )
        except KeyError as key:
            raise ValueError(f"config.json has no {key}") from key
        ids, vocab_size = read.blank_ids, read.vocab_size
        if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
            raise ValueError(f"special ids must be 0 to {vocab_size - 1}, got {ids}")
        least = 2 * read.position_rows * read.num_heads  # a pair a row a head
        if (width := read.embed_dim) % least:
            raise ValueError(f"hidden_size must be a multiple of {least}, is {width}")
        return read


class ChatGLMBlock(nn.Module):
    """Residuals that start from the norm's output, scaled by alpha.

    The original calls the feed-forward network `GLU`; it has no gate.

    Source: ChatGLM-6B `GLMBlock`; Wang et al. 2022 (DeepNet) for alpha.
    """

    def __init__(self, c: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(c.embed_dim, c.norm_eps)
        self.attention = FusedAttention(c.embed_dim, c.num_heads, layer)
        self.ffn_norm = LayerNorm(c.embed_dim, c.norm_eps)
        self.ffn = FeedForward(c.embed_dim, c.ffn_dim, gelu_tanh)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = self.attention_norm(x)
        x = x * ALPHA + self.attention(x, rotate, mask, cache)
        x = self.ffn_norm(x)
        return x * ALPHA + self.ffn(x)


class ChatGLM(nn.Module):
    """Token ids in, one score per vocabulary entry out, for every token."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = TokenEmbedding(c.vocab_size, c.embed_dim)
        # Layers count from 1: the scores of layer i are divided by i.
        self.blocks = nn.ModuleList(
            ChatGLMBlock(c, layer) for layer in range(1, c.num_layers + 1)
        )
        self.norm = LayerNorm(c.embed_dim, c.norm_eps)
        if not c.tied_head:
            self.lm_head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        if c.prefix_len:
            self.requires_grad_(False)  # P-tuning trains the prefix alone
            self.prefix_encoder = PrefixEncoder(
                c.prefix_len, c.num_layers, c.num_heads, c.head_dim, c.prefix_projection
            )

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: AnswerCache | None = None,
        positions: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        last_logits_only: bool = False,
    ) -> Float[Tensor, "B #T V"]:
        """Score the next token after each token given; append them to the cache.

        A prompt must come in one call, since its context is read in both directions.
        Positions (B, rows, T) and mask (B, 1, T, S) follow from the ids, after the
        prompt from the cache; given ones are taken instead. The mask covers the tokens
        so far, without a prefix. last_logits_only: score after the last token alone.

        Raises:
            ValueError: an id outside the vocabulary, a prompt without <sop> or mask
                token, positions or a mask of another shape, a negative position.
        """
        c, x = self.config, self.embedding(tokens)
        if cache is None:
            uncached = AnswerCache([None] * c.num_layers)
            cache = self.new_cache(*tokens.shape) if c.prefix_len else uncached
        stand, see = cache.place(tokens, c.blank_ids, c.position_rows, positions, mask)
        rotate = rotation(stand, c.head_dim, x.dtype)
        seen = F.pad(see, (c.prefix_len, 0), value=True)  # all see the prefix
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, rotate, seen, layer)
        cache.remember(tokens, stand, see, c.blank_ids)
        x = self.norm(x[:, -1:] if last_logits_only else x)
        return F.linear(x, self.embedding.weight) if c.tied_head else self.lm_head(x)

    def new_cache(self, batch_size: int, max_seq_len: int) -> AnswerCache:
        """Make room for max_seq_len tokens a row, after the prefix if there is one."""
        c, weight = self.config, self.embedding.weight
        size = (batch_size, c.num_heads, c.prefix_len + max_seq_len, c.head_dim)
        caches = [LayerCache(*size, weight.dtype, weight.device) for _ in self.blocks]
        if c.prefix_len:
            prefix = self.prefix_encoder(batch_size)
            for cache, (keys, values) in zip(caches, prefix, strict=True):
                cache.append(keys, values)
        return AnswerCache(caches)


# Our name of each module, and the original's; {} is the layer.
_MODULES = {
    "embedding": "transformer.word_embeddings",
    "blocks.{}.attention_norm": "transformer.layers.{}.input_layernorm",
    "blocks.{}.attention.qkv_proj": "transformer.layers.{}.attention.query_key_value",
    "blocks.{}.attention.out_proj": "transformer.layers.{}.attention.dense",
    # It follows attention, hence its name; it feeds the MLP, hence ours.
    "blocks.{}.ffn_norm": "transformer.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.up_proj": "transformer.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.ffn.down_proj": "transformer.layers.{}.mlp.dense_4h_to_h",
    "norm": "transformer.final_layernorm",
    "lm_head": "lm_head",
    "prefix_encoder.embedding": "transformer.prefix_encoder.embedding",
    "prefix_encoder.trans.0": "transformer.prefix_encoder.trans.0",
    "prefix_encoder.trans.2": "transformer.prefix_encoder.trans.2",
}
HF_NAMES = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in _MODULES.items()
    for kind in ("weight", "bias", "weight_scale")  # the last when quantized
}
# The original computes the frequencies anyway, and stores a tied head all the same.
IGNORED = (".rotary_emb.inv_freq", "lm_head.weight")
