"""Which tokens may a token look at? True means that it may."""

import torch
from jaxtyping import Bool, Float, Int
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


def prefix_mask(contexts: Int[Tensor, "B"], num_tokens: int) -> Bool[Tensor, "B 1 T T"]:
    """Causal, except that the first tokens of a row, its context, are seen by all.

    Context 0 or 1 is causal; context T sees everything. Each row has its own context.

    Source: Dong et al. 2019 (UniLM), seq-to-seq mask; ChatGLM-6B `get_masks`.
    """
    index = torch.arange(num_tokens, device=contexts.device)
    in_context = index < contexts[:, None]  # (B, T)
    return causal_mask(num_tokens, device=contexts.device) | in_context[:, None, None]


def hide_padding(
    mask: Bool[Tensor, "B 1 T S"], is_token: Bool[Tensor, "B S"]
) -> Bool[Tensor, "B 1 T S"]:
    """Take padding out: nothing sees it, and it sees nothing, not even itself.

    is_token covers the keys; the queries are the last T of them. A row with nothing
    visible is safe only with a finite fill, which ChatGLM's attention uses.

    Source: ChatGLM-6B `ChatGLMTokenizer._pad`.
    """
    queries = is_token[:, -mask.shape[-2] :]
    return mask & is_token[:, None, None, :] & queries[:, None, :, None]


def visible_to_masked(
    visible: Bool[Tensor, "*shape"],
) -> Bool[Tensor, "*shape"]:
    """Turn this book's masks into the original ChatGLM-6B's: there True hides.

    It is its own inverse.
    """
    return ~visible


def visible_to_additive(
    visible: Bool[Tensor, "*shape"], hidden: float = -torch.inf
) -> Float[Tensor, "*shape"]:
    """Make the mask that is added to scores: 0 where visible, hidden elsewhere.

    Source: transformers' 4D masks; torch `F.scaled_dot_product_attention`, attn_mask.
    """
    zeros = torch.zeros(visible.shape, device=visible.device)
    return zeros.masked_fill(~visible, hidden)


def additive_to_visible(
    additive: Float[Tensor, "*shape"],
) -> Bool[Tensor, "*shape"]:
    """Read back what an additive mask lets through: its zeros."""
    return additive == 0
