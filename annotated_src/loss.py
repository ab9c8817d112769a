"""How far the scores are from the text: what training makes small."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # a label that asks for nothing, in torch's cross_entropy too


def next_token_loss(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    ignore_index: int = IGNORE,
) -> Float[Tensor, ""]:
    """Average, over every label that counts, the surprise at it: -log of its share.

    labels are the token ids themselves, not shifted: the scores at t answer for label
    t + 1, so label 0 is never asked for. Labels equal to ignore_index do not count.
    It is a mean over the labels of the whole batch, not over rows: a long answer weighs
    more. Computed in float32, returned in the dtype of logits.

    Raises:
        ValueError: shapes that differ, a label outside the vocabulary, or no label that
            counts, where the original gives NaN.

    Source: ChatGLM-6B `ChatGLMForConditionalGeneration.forward`.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (B, T, V) and labels (B, T), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    counts, vocab_size = labels != ignore_index, logits.shape[-1]
    outside = labels[counts & ((labels < 0) | (labels >= vocab_size))]
    if outside.numel():
        raise ValueError(
            f"label {outside[0].item()} is neither in the vocabulary, "
            f"0 to {vocab_size - 1}, nor ignore_index ({ignore_index})"
        )
    if not counts[:, 1:].any():
        raise ValueError(
            f"nothing to predict: of labels {tuple(labels.shape)}, none after the "
            f"first of its row differs from ignore_index ({ignore_index})"
        )
    scores, targets = logits[:, :-1].float(), labels[:, 1:].long()
    scores, targets = scores.flatten(0, 1), targets.flatten()  # (B * (T - 1), V)
    loss = F.cross_entropy(scores, targets, ignore_index=ignore_index)
    return loss.type_as(logits)
