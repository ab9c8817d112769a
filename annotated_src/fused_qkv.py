"""One matrix for queries, keys and values, and the order in which its rows lie.

One product is faster than three, so many models store one matrix. It has H rows for
each head. Three orders are in use; here with 4 query heads, of which two and two share
a key/value head::

    plain      q0 q1 q2 q3  k0 k1  v0 v1
    per group  q0 q1 k0 v0  q2 q3 k1 v1
    per head   q0 k0 v0  q1 k1 v1  ...  (a key and a value for each query)

No shape tells them apart: the number of rows is the same.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor

LAYOUTS = ("per head", "per group", "plain")
"""Whose they are:

- per head: ChatGLM-6B, GPT-NeoX, BLOOM;
- per group: Falcon 40B and 180B, InternLM2;
- plain: the first files of Phi-2, Phi-3, Baichuan, ChatGLM2 and 3.
"""


def split_qkv(
    fused: Shaped[Tensor, "rows *D"],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused weight or bias into that of the queries, the keys and the values.

    Each comes out head by head, as `Attention` wants it. In the plain layout they are
    views.

    Raises:
        ValueError: an unknown layout, heads that do not fit it, or another number of
            rows.

    Source: transformers `GPTNeoXAttention.forward`, `FalconAttention._split_heads`,
    `Phi3Attention.forward`.
    """
    _check(num_heads, num_kv_heads, layout)
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    if fused.shape[0] != rows:
        raise ValueError(
            f"{num_heads} query heads and 2 x {num_kv_heads} others, of {head_dim} "
            f"rows each, are {rows} rows, got {fused.shape[0]}"
        )
    if layout == "plain":
        few = num_kv_heads * head_dim
        queries, keys, values = fused.split((num_heads * head_dim, few, few))
        return queries, keys, values
    # Per head is per group with one query head to a group.
    groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))  # (K, group + 2, H, *D)
    queries, keys, values = groups.split((num_heads // num_kv_heads, 1, 1), dim=1)
    return queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2)


def join_qkv(
    queries: Shaped[Tensor, "wide *D"],
    keys: Shaped[Tensor, "rows *D"],
    values: Shaped[Tensor, "rows *D"],
    head_dim: int,
    layout: str,
) -> Shaped[Tensor, "more *D"]:
    """Undo `split_qkv`: put the rows of three weights, or three biases, into one.

    Raises:
        ValueError: an unknown layout, or heads that do not fit it or head_dim.
    """
    sizes = [part.shape[0] for part in (queries, keys, values)]
    if head_dim < 1 or sizes[1] != sizes[2] or any(n % head_dim for n in sizes):
        raise ValueError(f"rows {sizes} are not heads of {head_dim}, as many k as v")
    num_heads, num_kv_heads = sizes[0] // head_dim, sizes[1] // head_dim
    _check(num_heads, num_kv_heads, layout)
    if layout == "plain":
        return torch.cat((queries, keys, values))
    groups = [
        part.unflatten(0, (num_kv_heads, -1, head_dim))
        for part in (queries, keys, values)
    ]
    return torch.cat(groups, dim=1).flatten(0, 2)


def _check(num_heads: int, num_kv_heads: int, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})"
        )
    if layout == "per head" and num_heads != num_kv_heads:
        raise ValueError(
            f"layout 'per head' has a key and a value for each query head, got "
            f"{num_heads} and {num_kv_heads} heads"
        )
