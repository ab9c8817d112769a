"""From the scores of the next token to a choice."""

from jaxtyping import Float, Int
from torch import Tensor


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
    """Choose the best-scored token of each row; the first of equals."""
    return logits.argmax(dim=-1)
