"""How far one model's scores are from another's, token by token, on the same text.

Texts are no measure: a near-tie that falls the other way changes all that follows. So
both models read the same tokens (teacher forcing), and their scores are compared.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

Logits = Float[Tensor, "B T V"] | Float[np.ndarray, "B T V"]


class Grades(NamedTuple):
    """What `grade` found, over all tokens that count."""

    agreement: float  # share of tokens whose best next token is the same
    mean_kl: float  # in nats; 0 is equal
    worst_kl: float


def grade(
    reference: Logits, other: Logits, is_token: Bool[Tensor, "B T"] | None = None
) -> Grades:
    """Compare two sets of logits, torch's or numpy's, of the same tokens.

    is_token is False at padding, which does not count.

    Raises:
        ValueError: their shapes differ, or nothing is to be compared.
    """
    divergences = kl_divergence(reference, other)
    counted = torch.ones_like(divergences).bool() if is_token is None else is_token
    if counted.shape != divergences.shape or not counted.any():
        raise ValueError(
            f"is_token {tuple(counted.shape)} must choose tokens out of "
            f"{tuple(divergences.shape)}, and chooses {int(counted.sum())}"
        )
    best, others = (torch.as_tensor(given).argmax(-1) for given in (reference, other))
    same = (best == others)[counted].double().mean().item()
    kept = divergences[counted]
    return Grades(same, kept.mean().item(), kept.max().item())


def kl_divergence(reference: Logits, other: Logits) -> Float64[Tensor, "B T"]:
    """Return KL(reference || other) at each token, in nats: the price of the other.

    It is how much more a text drawn from the reference surprises the other model than
    the reference itself, on average over the next token.

    Raises:
        ValueError: their shapes differ.

    Source: Kullback & Leibler 1951; torch `F.kl_div`.
    """
    if reference.shape != other.shape:
        shapes = tuple(reference.shape), tuple(other.shape)
        raise ValueError(f"logits of the same tokens have one shape, got {shapes}")
    ours, theirs = _log_shares(reference), _log_shares(other)
    # A token of probability 0 adds nothing; its logarithm is -inf.
    gain = torch.where(ours > -torch.inf, ours - theirs, 0.0)
    return (ours.exp() * gain).sum(dim=-1)


def text_perplexity(logits: Logits, tokens: Int[Tensor, "B T"]) -> float:
    """Return e to the mean surprise, in nats, at each token after a row's first.

    `scoring.perplexity` asks a model; this is for logits that are there already.

    Raises:
        ValueError: other rows or tokens than the logits', or fewer than two.
    """
    if tuple(tokens.shape) != tuple(logits.shape[:2]) or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} must be the (B, T) of logits "
            f"{tuple(logits.shape)}, two or more a row"
        )
    shares = _log_shares(logits)[:, :-1].gather(-1, tokens[:, 1:, None])
    return shares.mean().neg().exp().item()


def _log_shares(logits: Any) -> Tensor:
    return torch.as_tensor(logits).detach().double().log_softmax(dim=-1)
