"""Keys and values of the tokens already seen: one LayerCache per layer."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerCache:
    """Room for max_seq_len tokens of one layer, filled from the left."""

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self, keys: Float[Tensor, "B K T H"], values: Float[Tensor, "B K T H"]
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Store new tokens; return all of them, old and new, as views.

        Raises:
            ValueError: the sizes of batch and heads are not the cache's, keys and
                values differ, or the tokens do not fit. The cache is then as it was.
        """
        batch_size, num_kv_heads, capacity, head_dim = self.keys.shape
        given = (keys.shape[0], keys.shape[1], keys.shape[3])
        if given != (batch_size, num_kv_heads, head_dim):
            raise ValueError(
                f"cache holds (batch, heads, head_dim) = "
                f"{(batch_size, num_kv_heads, head_dim)}, got {given}"
            )
        if values.shape != keys.shape:
            raise ValueError(
                f"keys are {tuple(keys.shape)} and values {tuple(values.shape)}"
            )
        end = self.length + keys.shape[2]
        if end > capacity:
            raise ValueError(
                f"cache is full: it holds {capacity} tokens, {self.length} are in use "
                f"and {keys.shape[2]} more were given"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Int[Tensor, "B"]) -> None:
        """Let row i go on from what row rows[i] holds: beams change places.

        Source: transformers `Cache.reorder_cache`.
        """
        self.keys, self.values = self.keys[rows], self.values[rows]

    @property
    def num_bytes(self) -> int:
        """Memory reserved for keys and values together."""
        return self.keys.nbytes + self.values.nbytes


def new_caches(
    sizes: Any, batch_size: int, max_seq_len: int, weight: Tensor
) -> list[LayerCache]:
    """Make room for max_seq_len tokens a row: a cache a layer, as weight is stored.

    sizes is a model's config, with num_layers, num_kv_heads and head_dim.
    """
    shape = (batch_size, sizes.num_kv_heads, max_seq_len, sizes.head_dim)
    return [
        LayerCache(*shape, weight.dtype, weight.device) for _ in range(sizes.num_layers)
    ]


def cached_length(cache: Sequence[LayerCache] | None) -> int:
    """Tokens already in the cache; 0 without one."""
    return cache[0].length if cache else 0
