"""Samplers: what chooses each row's next token, from its scores and the text so far."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from annotated_src.sampling import (
    guard_invalid,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

Sampler = Callable[[Float[Tensor, "B V"], Int[Tensor, "B S"]], Int[Tensor, "B"]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw each row's token by its probability, once the filters have had their say.

    They act in this order: guard, repetition_penalty, temperature, top_k, top_p, min_p.
    It is a sampler for `generate`; a generator of one's own makes the draws repeatable.

    Raises:
        ValueError: a value that its filter refuses, when made; scores that are not
            finite, when called without the guard.

    Source: transformers `GenerationMixin._get_logits_processor`, `_sample`.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    guard: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        # A rehearsal, so that a bad value is refused now, not at the first token.
        self.probabilities(torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.long))

    def probabilities(
        self, logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B S"] | None = None
    ) -> Float32[Tensor, "B V"]:
        """Return what `__call__` draws from: each row sums to 1.

        tokens are those so far; without them, no repetition is penalised.
        """
        if self.guard:
            logits = guard_invalid(logits)
        if tokens is not None:
            logits = repetition_penalty(logits, tokens, self.repetition_penalty)
        logits = temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        return min_p(top_p(logits, self.top_p), self.min_p).softmax(dim=-1)

    def __call__(
        self, logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B S"] | None = None
    ) -> Int[Tensor, "B"]:
        probabilities = self.probabilities(logits, tokens)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


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
