"""One sentence, cut into context and answer in every way: who sees whom, and where."""

from typing import Any

from torch import Tensor

from annotated_src.blank_infilling import Example, mask_rest, mask_span
from annotated_src.masks import prefix_mask
from annotated_src.positions import BlankIds, context_lengths, prompt_positions

SPECIAL = ("<sop>", "[gMASK]", "[MASK]", "<eop>")
WORDS = ("she", "opened", "the", "door", "and", "left")
VOCABULARY = SPECIAL + WORDS
IDS, EOP = BlankIds(sop=0, gmask=1, mask=2), 3


def cut_at(context: int, kind: str) -> Example:
    """Cut the sentence so that so many tokens are context, the mask token among them.

    The blank of `[gMASK]` is at the end. That of `[MASK]` begins at the third word, or
    before it where the context is too short for that.
    """
    text = [VOCABULARY.index(word) for word in WORDS]
    if kind == "[gMASK]":
        return mask_rest(text, context - 1, IDS, EOP)
    start = min(2, context - 1)
    return mask_span(text, start, start + len(text) + 1 - context, IDS, EOP)


def describe(tokens: Tensor) -> dict[str, Any]:
    """Say of a row of ids who may look at whom, and what position each token gets."""
    mask = prefix_mask(context_lengths(tokens[None], IDS.sop), len(tokens))[0, 0]
    places, steps = prompt_positions(tokens[None], IDS, rows=2)[0].tolist()
    return {
        "words": [VOCABULARY[token] for token in tokens.tolist()],
        "mask": ["".join(map(str, row)) for row in mask.int().tolist()],
        "places": places,
        "steps": steps,
    }


def prefix_mask_data() -> dict[str, Any]:
    """Describe both kinds of blank at every length of the context, from 1 to 6."""
    return {
        kind: [describe(cut_at(c, kind).tokens) for c in range(1, len(WORDS) + 1)]
        for kind in ("[MASK]", "[gMASK]")
    }
