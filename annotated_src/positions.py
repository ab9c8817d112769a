"""The number that each token gets, counted from 0."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def positions_after(
    num_cached: int, num_tokens: int, device: torch.device | None = None
) -> Int[Tensor, "1 T"]:
    """Count on from the tokens already in the cache."""
    return torch.arange(num_cached, num_cached + num_tokens, device=device)[None]


def padded_positions(is_token: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Count tokens only, so that a left-padded row has the numbers it has alone.

    Padding before the first token gets 0; nothing looks at it.

    Source: transformers `GenerationMixin`, position ids from the attention mask.
    """
    return (is_token.cumsum(dim=-1) - 1).clamp(min=0)
