"""Scaled dot-product attention, spelled out and fused, and the layer around it."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.kv_cache import LayerCache

Rotate = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def repeat_kv(x: Float[Tensor, "B K S H"], group: int) -> Float[Tensor, "B N S H"]:
    """Give each of N = K * group query heads its key/value head: 0 0 1 1, not 0 1 0 1.

    Source: transformers `repeat_kv`.
    """
    # A view, stride 0 along the group. flatten copies, unless K or group is 1.
    shared = x[:, :, None].expand(-1, -1, group, -1, -1)  # (B, K, group, S, H)
    return shared.flatten(1, 2)


def attend(
    queries: Float[Tensor, "B N T H"],
    keys: Float[Tensor, "B K S H"],
    values: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, "#B 1 T S"],
) -> Float[Tensor, "B N T H"]:
    """Average the values, weighted by how well each key answers each query.

    A row of the mask with nothing visible gives NaN; `padded_causal_mask` has none.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 for N > K;
    transformers `eager_attention_forward`.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = repeat_kv(keys, group), repeat_kv(values, group)
    scores = queries @ keys.transpose(-2, -1)  # (B, N, T, S)
    scores = scores / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(values)
    return weights @ values


def attend_fused(
    queries: Float[Tensor, "B N T H"],
    keys: Float[Tensor, "B K S H"],
    values: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, "#B 1 T S"],
) -> Float[Tensor, "B N T H"]:
    """Do the same as `attend` in one call: no (T, S) weights are held, no head copied.

    Only a row with nothing visible differs: it gives 0, not NaN.

    Source: torch `F.scaled_dot_product_attention`; Dao et al. 2022.
    """
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=True
    )


def attend_folded(
    queries: Float[Tensor, "B N T H"],
    keys: Float[Tensor, "B K S H"],
    values: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, "#B 1 T S"],
) -> Float[Tensor, "B N T H"]:
    """Do the same with plain products that copy no head: a group's queries are rows.

    Query heads that share keys become more rows for the same keys, and are heads again
    afterwards. For compilers that have no fused attention.
    """
    num_kv_heads, num_tokens = keys.shape[1], queries.shape[2]
    rows = queries.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)  # (B, K, group*T, H)
    scores = rows @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    scores = scores.unflatten(2, (-1, num_tokens))  # (B, K, group, T, S)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(values)
    heads = weights.flatten(2, 3) @ values  # (B, K, group * T, H)
    return heads.unflatten(2, (-1, num_tokens)).flatten(1, 2)


class Attention(nn.Module):
    """Project to heads, rotate queries and keys, attend, project back.

    It calls `attend_fused`, which is `attend` without its copies of keys and values.
    An exporter puts `attend_folded` in its place.

    num_kv_heads = num_heads is multi-head attention, 1 is multi-query, and a divisor
    in between is grouped-query.

    Raises:
        ValueError: num_kv_heads does not divide num_heads.

    Source: Ainslie et al. 2023; transformers `LlamaAttention`.
    """

    attend: Attend = staticmethod(attend_fused)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})"
            )
        self.head_dim = head_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        queries = rotate(self.split_heads(self.q_proj(x)))  # (B, N, T, H)
        keys = rotate(self.split_heads(self.k_proj(x)))  # (B, K, T, H)
        values = self.split_heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, K, S, H)
        heads = self.attend(queries, keys, values, mask)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # from (B, T, N * H)

    def split_heads(self, x: Float[Tensor, "B T wide"]) -> Float[Tensor, "B heads T H"]:
        """Cut the features of each token into heads, and bring the heads forward."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
