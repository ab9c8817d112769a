"""Make training examples of plain text: take a span out, ask for it back.

An example reads `text with a mask token in place of the span`, then `<sop> span <eop>`.
`positions` and `masks` read off those ids where each token stands and what it sees.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from annotated_src.loss import IGNORE
from annotated_src.positions import BlankIds

MEAN_SPAN = 3.0  # of the Poisson distribution that short spans are drawn from
LEAST_REST = 0.5  # of a text, when all after some point is to be written


class Example(NamedTuple):
    """One text to learn from; labels are IGNORE where nothing is asked."""

    tokens: Int[Tensor, "T"]
    labels: Int[Tensor, "T"]


def mask_span(
    text_ids: Sequence[int], start: int, end: int, ids: BlankIds, eop_id: int
) -> Example:
    """Take text_ids[start:end] out, leave [MASK] there, and ask for it at the end.

    The labels are the ids of the answer themselves, <sop> included, not shifted; the
    loss shifts them. So the last context token is asked for <sop>, which `generate`
    never needs: the prompt brings it along.

    Raises:
        ValueError: an empty span, one that is not inside the text, or a special id in
            the text.

    Source: Du et al. 2022, section 2.1.1; ChatGLM-6B `ptuning/main.py`, labels.
    """
    if not 0 <= start < end <= len(text_ids):
        raise ValueError(
            f"span must be 0 <= start < end <= {len(text_ids)}, got {start} to {end}"
        )
    context = [*text_ids[:start], ids.mask, *text_ids[end:]]
    return _example(text_ids, context, text_ids[start:end], ids, eop_id)


def mask_rest(
    text_ids: Sequence[int], start: int, ids: BlankIds, eop_id: int
) -> Example:
    """Keep text_ids[:start], put [gMASK] after it, and ask for the rest.

    With start 0 the context is [gMASK] alone. Labels as in `mask_span`.

    Raises:
        ValueError: nothing is left to ask for, start is negative, or a special id is in
            the text.

    Source: Du et al. 2022, section 2.1.2, document-level.
    """
    if not 0 <= start < len(text_ids):
        raise ValueError(f"start must be 0 to {len(text_ids) - 1}, got {start}")
    context = [*text_ids[:start], ids.gmask]
    return _example(text_ids, context, text_ids[start:], ids, eop_id)


def draw_example(
    text_ids: Sequence[int],
    ids: BlankIds,
    eop_id: int,
    generator: torch.Generator | None = None,
) -> Example:
    """Toss a coin: a short blank anywhere, or the last half or more of the text.

    A short blank has a Poisson length of mean 3, given that it is at least 1 and fits;
    GLM takes several until 15 % of the text is out, here it is one. The rest of a text
    is 50 to 100 % of it, each length equally likely; GLM lets it stand anywhere.

    Raises:
        ValueError: an empty text, or a special id in it.

    Source: Du et al. 2022, sections 2.1.1 and 2.1.2.
    """
    size = len(text_ids)
    if size == 0:
        raise ValueError("there is no text to make a blank in")
    if _below(2, generator):
        least = math.ceil(LEAST_REST * size)
        length = least + _below(size - least + 1, generator)
        return mask_rest(text_ids, size - length, ids, eop_id)
    lengths = torch.arange(1.0, size + 1)
    weights = lengths * torch.tensor(MEAN_SPAN).log() - torch.lgamma(lengths + 1)
    chances = weights.softmax(dim=0)  # Poisson's, those of 1 to size scaled up to 1
    length = 1 + int(torch.multinomial(chances, 1, generator=generator))
    start = _below(size - length + 1, generator)
    return mask_span(text_ids, start, start + length, ids, eop_id)


def pad_right(
    examples: Sequence[Example], pad_id: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Make one batch of examples, padding after the shorter ones with label IGNORE.

    No mask hides this padding: it comes after the answer, which sees no later token.

    Raises:
        ValueError: no examples, or one that has not as many labels as tokens.
    """
    if not examples:
        raise ValueError("there are no examples to pad")
    for tokens, labels in examples:
        if tokens.shape != labels.shape:
            raise ValueError(f"{len(tokens)} tokens with {len(labels)} labels")
    tokens = [example.tokens for example in examples]
    labels = [example.labels for example in examples]
    return pad_sequence(tokens, True, pad_id), pad_sequence(labels, True, IGNORE)


def _example(
    text_ids: Sequence[int],
    context: Sequence[int],
    span: Sequence[int],
    ids: BlankIds,
    eop_id: int,
) -> Example:
    special = [i for i in text_ids if i in (*ids, eop_id)]
    if special:
        raise ValueError(f"the text has the special id {special[0]} in it")
    answer = [ids.sop, *span, eop_id]
    tokens = torch.tensor([*context, *answer])
    labels = torch.tensor([IGNORE] * len(context) + answer)
    return Example(tokens, labels)


def _below(limit: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(limit, (), generator=generator))
