"""Filters of the next token's scores, and the plain choice of the best.

Each is a function of its own. `annotated_src.sampler` puts them in order and draws.
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

FALLBACK_ID = 5  # what ChatGLM-6B says when its scores are broken


def greedy(
    logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B S"] | None = None
) -> Int[Tensor, "B"]:
    """Choose the best-scored token of each row; the first of equals.

    It is a sampler for `generate`; the tokens so far do not matter to it.

    Raises:
        ValueError: a row's best score is not finite.
    """
    return _checked(logits).argmax(dim=-1)


def repetition_penalty(
    logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B S"], penalty: float
) -> Float32[Tensor, "B V"]:
    """Make the tokens that a row already has less likely, or below 1, likelier.

    Scores above 0 are divided by the penalty, scores below 0 multiplied: both go down.
    How often a token has come does not matter. Scores have no natural zero, so a
    constant added to a row, which changes no probability, changes what this does.

    Raises:
        ValueError: penalty is not above 0 and finite, a token is outside the
            vocabulary, or a row's best score is not finite.

    Source: Keskar et al. 2019, section 4.1; transformers
    `RepetitionPenaltyLogitsProcessor`.
    """
    if not 0 < penalty < torch.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {penalty}")
    logits, vocab_size = _checked(logits), logits.shape[-1]
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"tokens must be 0 to {vocab_size - 1}, got ids from {tokens.min()} "
            f"to {tokens.max()}"
        )
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    has_come = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)
    return torch.where(has_come, penalised, logits)


def temperature(logits: Float[Tensor, "B V"], t: float) -> Float32[Tensor, "B V"]:
    """Divide the scores: t below 1 favours the best, above 1 evens out.

    Raises:
        ValueError: t is not above 0 and finite, or a row's best score is not finite.

    Source: transformers `TemperatureLogitsWarper`.
    """
    if not 0 < t < torch.inf:
        raise ValueError(f"temperature must be above 0, got {t}; for 0, use greedy")
    return _checked(logits) / t


def top_k(logits: Float[Tensor, "B V"], k: int) -> Float32[Tensor, "B V"]:
    """Exclude, with -inf, all but the k best of each row.

    Whatever equals the k-th best stays too; a k above V excludes nothing.

    Raises:
        ValueError: k is below 1, or a row's best score is not finite.

    Source: Fan et al. 2018, section 5.1; transformers `TopKLogitsWarper`.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    logits = _checked(logits)
    kth_best = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth_best, -torch.inf)


def top_p(logits: Float[Tensor, "B V"], p: float) -> Float32[Tensor, "B V"]:
    """Exclude, with -inf, the tail of each row: its last 1 - p of probability.

    What stays is the fewest tokens that share p between them, and at least one. Of
    equals on the border some may stay and others go, as the sort leaves them.

    Raises:
        ValueError: p is not above 0 and at most 1, or a row's best score is not finite.

    Source: Holtzman et al. 2020, section 3.1; transformers `TopPLogitsWarper`.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    logits = _checked(logits)
    rising, ids = logits.sort(dim=-1)
    excluded = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    excluded[:, -1] = False  # the best
    excluded = excluded.scatter(1, ids, excluded)  # back in the order of ids
    return logits.masked_fill(excluded, -torch.inf)


def min_p(logits: Float[Tensor, "B V"], p: float) -> Float32[Tensor, "B V"]:
    """Exclude, with -inf, what is less than p times as likely as the row's best.

    Where the model is sure, few stay; where it is not, many. 0 excludes nothing.

    Raises:
        ValueError: p is not 0 to 1, or a row's best score is not finite.

    Source: Nguyen et al. 2024, section 3; transformers `MinPLogitsWarper`.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be 0 to 1, got {p}")
    logits = _checked(logits)
    shares = logits.softmax(dim=-1)
    best = shares.amax(dim=-1, keepdim=True)
    return logits.masked_fill(shares < p * best, -torch.inf)


def guard_invalid(
    logits: Float[Tensor, "B V"], fallback_id: int = FALLBACK_ID
) -> Float32[Tensor, "B V"]:
    """Turn broken scores into a sure choice of fallback_id, rather than an error.

    One NaN or infinity, -inf too, and every row is replaced, the sound ones with it.
    So it comes first, before anything excludes tokens.

    Raises:
        ValueError: fallback_id is outside the vocabulary.

    Source: ChatGLM-6B `InvalidScoreLogitsProcessor`.
    """
    vocab_size = logits.shape[-1]
    if not 0 <= fallback_id < vocab_size:
        raise ValueError(f"id {fallback_id} is outside 0 to {vocab_size - 1}")
    if logits.isfinite().all():
        return logits.float()
    replaced = torch.zeros_like(logits, dtype=torch.float32)
    replaced[:, fallback_id] = 5e4
    return replaced


def _checked(logits: Tensor) -> Tensor:
    """In float32; each row must have a finite best score. -inf elsewhere is fine."""
    best = logits.float().amax(dim=-1)  # NaN, if there is one
    broken = (~best.isfinite()).nonzero().flatten().tolist()
    if broken:
        row, score = broken[0], best[broken[0]].item()
        raise ValueError(f"row {row}: the best score is {score}, not a finite number")
    return logits.float()
