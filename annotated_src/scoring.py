"""How well a model expects a text: log-probabilities, and perplexity."""

import math
from typing import Any

import torch
from jaxtyping import Float32, Int
from torch import Tensor


@torch.inference_mode()
def token_log_probs(
    model: Any, tokens: Int[Tensor, "B T"], **given: Tensor
) -> Float32[Tensor, "B T_minus_1"]:
    """Return the log-probability, in nats, of each token after the first of its row.

    given is what the model takes beside tokens: is_token, or positions and mask.

    Raises:
        ValueError: rows of fewer than two tokens, or an id outside the vocabulary.

    Source: transformers `GenerationMixin.compute_transition_scores`.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"to score takes 2 tokens or more, got {tokens.shape[1]}")
    shares = model(tokens, **given)[:, :-1].float().log_softmax(dim=-1)
    return shares.gather(-1, tokens[:, 1:, None])[..., 0]


def perplexity(
    model: Any, tokens: Int[Tensor, "1 T"], stride: int | None = None
) -> float:
    """Return e to the mean surprise at each token after the first, in nats.

    It is the number of equally likely tokens that would surprise as much: 1 is sure,
    V knows nothing. A text beyond the model's context is read in windows of full
    length that start stride tokens apart (half a context, if not said); a window
    scores only what the one before has not, so that every token is scored once.

    Raises:
        ValueError: fewer than two tokens, or a stride that is not 1 to max_seq_len - 1.
    """
    context = model.config.max_seq_len
    stride = max(1, context // 2) if stride is None else stride
    if not 0 < stride < context:
        raise ValueError(f"stride must be 1 to {context - 1}, got {stride}")
    total, scored = 0.0, 1  # nothing comes before the first token
    for start in range(0, max(tokens.shape[1] - context, 0) + stride, stride):
        window = tokens[:, start : start + context]
        log_probs = token_log_probs(model, window)
        total -= log_probs[0, scored - start - 1 :].double().sum().item()
        scored = start + window.shape[1]
    return math.exp(total / (scored - 1))
