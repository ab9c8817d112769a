"""ChatGLM's attention: the sums of `attend`, ordered so that float16 holds them."""

import math

from jaxtyping import Bool, Float
from torch import Tensor, nn

from annotated_src.attention import Rotate
from annotated_src.kv_cache import LayerCache

HIDDEN_SCORE = -10000.0  # what a hidden score is filled with


def scores_by_layer(
    queries: Float[Tensor, "B N T H"], keys: Float[Tensor, "B N S H"], layer: int
) -> Float[Tensor, "B N T S"]:
    """Score queries against keys, divided by the layer's number (from 1) on top.

    Queries are divided before the product, so that float16, which ends at 65504, holds
    scores that are layer times as large.

    Source: ChatGLM-6B `attention_fn`, query_key_layer_scaling_coeff.
    """
    queries = queries / (math.sqrt(queries.shape[-1]) * layer)
    return queries @ keys.transpose(-2, -1)


def restore_scores(
    scores: Float[Tensor, "B N T S"], mask: Bool[Tensor, "#B 1 T S"], layer: int
) -> Float[Tensor, "B N T S"]:
    """Hide what the mask hides, then multiply the layer's number back, in float32.

    So hidden scores become -10000 times the layer: finite, and a row with nothing
    visible averages all values instead of giving NaN.

    Source: ChatGLM-6B `attention_fn`.
    """
    return scores.masked_fill(~mask, HIDDEN_SCORE).float() * layer


def attend_by_layer(
    queries: Float[Tensor, "B N T H"],
    keys: Float[Tensor, "B N S H"],
    values: Float[Tensor, "B N S H"],
    mask: Bool[Tensor, "#B 1 T S"],
    layer: int,
) -> Float[Tensor, "B N T H"]:
    """Average the values as `attend` does, by steps that stay in range in float16.

    Source: ChatGLM-6B `attention_fn`.
    """
    scores = restore_scores(scores_by_layer(queries, keys, layer), mask, layer)
    return scores.softmax(dim=-1).type_as(values) @ values


class FusedAttention(nn.Module):
    """Attention whose queries, keys and values come out of one matrix product.

    The rows of the matrix lie head by head: queries, keys and values of a head, then
    the next head.

    Raises:
        ValueError: num_heads does not divide embed_dim.

    Source: ChatGLM-6B `SelfAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, layer: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})"
            )
        self.num_heads, self.layer = num_heads, layer
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        queries, keys, values = self.split_heads(self.qkv_proj(x))  # (B, N, T, H)
        queries, keys = rotate(queries), rotate(keys)
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, N, S, H)
        heads = attend_by_layer(queries, keys, values, mask, self.layer)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # from (B, T, N * H)

    def split_heads(self, fused: Float[Tensor, "B T wide"]) -> tuple[Tensor, ...]:
        """Cut the fused features into heads first, then each head into q, k and v."""
        by_head = fused.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return by_head.chunk(3, dim=-1)  # of (B, N, T, 3 * H)
