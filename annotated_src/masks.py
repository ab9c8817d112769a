"""Which tokens may a token look at? True means that it may."""

import torch
from jaxtyping import Bool
from torch import Tensor


def causal_mask(
    num_tokens: int, num_cached: int = 0, device: torch.device | None = None
) -> Bool[Tensor, "1 1 T S"]:
    """Let each token see the cache, the tokens before it in this call, and itself.

    Row t is the token at position num_cached + t; S = num_cached + num_tokens.
    """
    size = (num_tokens, num_cached + num_tokens)
    everything = torch.ones(size, dtype=torch.bool, device=device)
    return everything.tril(diagonal=num_cached)[None, None]


def padded_causal_mask(
    is_token: Bool[Tensor, "B S"], num_tokens: int
) -> Bool[Tensor, "B 1 T S"]:
    """Causal, with padding hidden from every token of its row.

    is_token is False at padding, over the cache and this call. Each position still sees
    itself: a padding row with nothing to see would divide zero by zero in the softmax.

    Raises:
        ValueError: fewer columns than tokens in this call.
    """
    num_keys = is_token.shape[1]
    if num_keys < num_tokens:
        raise ValueError(f"is_token covers {num_keys} positions, the call {num_tokens}")
    num_cached = num_keys - num_tokens
    causal = causal_mask(num_tokens, num_cached, is_token.device)
    itself = torch.eye(num_keys, dtype=torch.bool, device=is_token.device)[num_cached:]
    return causal & is_token[:, None, None, :] | itself
