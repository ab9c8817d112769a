"""Follow several continuations at once, and return the likeliest."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.inference_mode()
def beam_search(
    model: Any,
    tokens: Int[Tensor, "B T"],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
) -> Int[Tensor, "B S"]:
    """Return the prompt and the best continuation among those that the beams followed.

    At every step each beam offers its next tokens, and the best num_beams of all go on.
    Every token lowers the log-probability, so that a short answer would win; hence it
    is divided by the length, prompt included, to the power of length_penalty.

    Raises:
        ValueError: several rows, or num_beams or max_new_tokens below 1.

    Source: transformers 4.27 `GenerationMixin.beam_search`, `BeamSearchScorer`.
    """
    if tokens.shape[0] != 1 or num_beams < 1 or max_new_tokens < 1:
        raise ValueError(
            f"beam search takes 1 row, 1 beam or more and 1 new token or more, got "
            f"{tokens.shape[0]}, {num_beams} and {max_new_tokens}"
        )
    cache = model.new_cache(num_beams, tokens.shape[1] + max_new_tokens)
    beams = Beams(tokens.expand(num_beams, -1), length_penalty)
    step = beams.tokens
    for _ in range(max_new_tokens):
        rows = beams.grow(model(step, cache)[:, -1], stop_ids)
        if beams.is_decided():
            break
        for layer in cache:
            layer.reorder(rows)
        step = beams.tokens[:, -1:]
    return beams.best()


class Beams:
    """The continuations that go on, and the best of those that ended."""

    def __init__(self, tokens: Int[Tensor, "beams T"], length_penalty: float) -> None:
        self.tokens, self.length_penalty = tokens, length_penalty
        self.scores = torch.full((len(tokens),), -torch.inf, device=tokens.device)
        self.scores[0] = 0  # the beams are alike at first, so one speaks for all
        self.ended: list[tuple[float, Tensor]] = []  # best first
        self.outlook = torch.inf  # the best that a beam could end with

    def grow(
        self, logits: Float[Tensor, "beams V"], stop_ids: Collection[int]
    ) -> Int[Tensor, "beams"]:
        """Add a token to each beam; return the row that each beam came from."""
        num_beams, vocab_size = logits.shape
        per_length = self.tokens.shape[1] ** -self.length_penalty
        offers = self.scores[:, None] + logits.float().log_softmax(dim=-1)
        # Twice as many as beams: if num_beams of them end, as many can still go on.
        best, indices = offers.flatten().topk(min(2 * num_beams, offers.numel()))
        rows, ids = indices // vocab_size, indices % vocab_size
        stops = torch.tensor([int(i) in stop_ids for i in ids], device=ids.device)
        for i in stops[:num_beams].nonzero().flatten():
            answer = torch.cat((self.tokens[rows[i]], ids[i, None]))
            self.ended.append((best[i].item() * per_length, answer))
        self.ended = sorted(self.ended, key=lambda end: -end[0])[:num_beams]
        self.outlook = best[0].item() * per_length
        going = (~stops).nonzero().flatten()[:num_beams]
        self.scores, rows = best[going], rows[going]
        self.tokens = torch.cat((self.tokens[rows], ids[going, None]), dim=1)
        return rows

    def is_decided(self) -> bool:
        """Tell whether enough have ended, and no beam that goes on can still win."""
        return len(self.ended) == len(self.tokens) and self.ended[-1][0] >= self.outlook

    def best(self) -> Int[Tensor, "1 S"]:
        """Return the best of those that ended and, if undecided, of the others too."""
        ends = list(self.ended)
        if not self.is_decided():
            scores = self.scores * self.tokens.shape[1] ** -self.length_penalty
            ends += zip(scores.tolist(), self.tokens, strict=True)
        return max(ends, key=lambda end: end[0])[1][None]
