"""From the scores of the next token to a choice."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

FALLBACK_ID = 5  # what ChatGLM-6B says when its scores are broken


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
    """Choose the best-scored token of each row; the first of equals."""
    return logits.argmax(dim=-1)


def temperature(logits: Float[Tensor, "B V"], t: float) -> Float32[Tensor, "B V"]:
    """Divide the scores: t below 1 favours the best, above 1 evens out.

    Raises:
        ValueError: t is not above 0, or a row's best score is not finite.

    Source: transformers `TemperatureLogitsWarper`.
    """
    if not t > 0:
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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw each row's token by its probability, once the filters have had their say.

    They act in this order: guard, temperature, top_k, top_p. It is a sampler for
    `generate`; a generator of one's own makes the draws repeatable.

    Raises:
        ValueError: a value that its filter refuses, when made; scores that are not
            finite, when called without the guard.

    Source: transformers `GenerationMixin._sample`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guard: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        # A rehearsal, so that a bad value is refused now, not at the first token.
        self.probabilities(torch.zeros(1, FALLBACK_ID + 1))

    def probabilities(self, logits: Float[Tensor, "B V"]) -> Float32[Tensor, "B V"]:
        """Return what `__call__` draws from: each row sums to 1."""
        if self.guard:
            logits = guard_invalid(logits)
        logits = temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        return top_p(logits, self.top_p).softmax(dim=-1)

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
        drawn = torch.multinomial(
            self.probabilities(logits), 1, generator=self.generator
        )
        return drawn[:, 0]  # from (B, 1)


def chatglm_sampler(generator: torch.Generator | None = None) -> Sample:
    """Draw as ChatGLM-6B does in conversation.

    Its code asks for the guard, 0.95 and 0.7. The 50 is the default of transformers 4,
    which it does not switch off.

    Source: ChatGLM-6B `ChatGLMForConditionalGeneration.chat`; transformers 4.27.1
    `GenerationConfig`.
    """
    return Sample(
        guard=True, temperature=0.95, top_k=50, top_p=0.7, generator=generator
    )


def _checked(logits: Tensor) -> Tensor:
    """In float32; each row must have a finite best score. -inf elsewhere is fine."""
    best = logits.float().amax(dim=-1)  # NaN, if there is one
    broken = (~best.isfinite()).nonzero().flatten().tolist()
    if broken:
        row, score = broken[0], best[broken[0]].item()
        raise ValueError(f"row {row}: the best score is {score}, not a finite number")
    return logits.float()
