"""Where the tokens of a call stand, and which tokens each may look at."""

from collections.abc import Sequence

from jaxtyping import Bool, Int
from torch import Tensor

from annotated_src.kv_cache import LayerCache, cached_length
from annotated_src.masks import causal_mask, padded_causal_mask
from annotated_src.positions import padded_positions, positions_after


def place_causally(
    tokens: Int[Tensor, "B T"],
    cache: Sequence[LayerCache] | None,
    is_token: Bool[Tensor, "B S"] | None,
) -> tuple[Int[Tensor, "#B T"], Bool[Tensor, "#B 1 T S"]]:
    """Count on from the cache, and let each token see what came before it.

    is_token is False at left padding, over the cache and this call; None is no padding.

    Raises:
        ValueError: is_token has another shape.
    """
    num_tokens, num_cached = tokens.shape[1], cached_length(cache)
    if is_token is None:
        positions = positions_after(num_cached, num_tokens, tokens.device)
        return positions, causal_mask(num_tokens, num_cached, tokens.device)
    covered = (tokens.shape[0], num_cached + num_tokens)
    if is_token.shape != covered:
        given = tuple(is_token.shape)
        raise ValueError(f"is_token must be (B, S) = {covered}, got {given}")
    positions = padded_positions(is_token)[:, num_cached:]
    return positions, padded_causal_mask(is_token, num_tokens)
