"""The numbers that each token gets.

Llama counts from 0. ChatGLM gives every token two numbers: row 0 says where in the text
it belongs, row 1 how far into the generated answer it is. An answer belongs where the
mask token stands, so its row 0 repeats the position of the mask.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class BlankIds(NamedTuple):
    """The special ids that tell a prompt's context from its answer."""

    sop: int  # <sop>, opens the answer
    gmask: int  # [gMASK], a blank at the end of the text, of any length
    mask: int  # [MASK], a short blank inside it


def positions_after(
    num_cached: int, num_tokens: int, device: torch.device | None = None
) -> Int[Tensor, "1 T"]:
    """Count on from the tokens already in the cache."""
    return torch.arange(num_cached, num_cached + num_tokens, device=device)[None]


def padded_positions(is_token: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Count tokens only, so that a left-padded row has the numbers it has alone.

    Padding before the first token gets 0; nothing looks at it.

    Source: transformers `GenerationMixin`, position ids from the attention mask.
    """
    return (is_token.cumsum(dim=-1) - 1).clamp(min=0)


def context_lengths(tokens: Int[Tensor, "B T"], sop_id: int) -> Int[Tensor, "B"]:
    """Count the tokens before the first <sop>, where the answer begins.

    Padding on the left counts, as in the original.

    Raises:
        ValueError: a row without <sop>.

    Source: ChatGLM-6B `get_masks`.
    """
    return _first_index(tokens == sop_id, f"<sop> (id {sop_id})")


def mask_positions(
    tokens: Int[Tensor, "B T"], preferred_id: int, other_id: int
) -> Int[Tensor, "B"]:
    """Find the mask token that the answer replaces: the first of the preferred kind.

    A row that has none of that kind is answered at its first of the other kind. The
    model prefers [gMASK], the tokenizer [MASK]; they differ when a row has both.

    Raises:
        ValueError: a row with neither.

    Source: ChatGLM-6B `ChatGLMModel.forward`; `ChatGLMTokenizer._pad`.
    """
    is_preferred = tokens == preferred_id
    lacks_it = ~is_preferred.any(dim=-1, keepdim=True)
    found = is_preferred | (lacks_it & (tokens == other_id))
    return _first_index(found, f"mask token (id {preferred_id} or {other_id})")


def blank_positions(
    contexts: Int[Tensor, "B"], masks: Int[Tensor, "B"], num_tokens: int
) -> Int[Tensor, "B 2 T"]:
    """Give each token its two numbers; contexts and masks say where the answer is.

    Row 0 counts through the context and then stays at the mask. Row 1 is 0 in the
    context, then counts from 1, which `<sop>` has.

    Source: Du et al. 2022, section 2.2.1; ChatGLM-6B `get_position_ids`.
    """
    index = torch.arange(num_tokens, device=contexts.device)  # (T)
    in_answer = index >= contexts[:, None]  # (B, T)
    place = torch.where(in_answer, masks[:, None], index)
    step = (index - contexts[:, None] + 1).clamp(min=0)
    return torch.stack((place, step), dim=1)


def blank_positions_1d(
    contexts: Int[Tensor, "B"],
    masks: Int[Tensor, "B"],
    stays: Bool[Tensor, "B"],
    num_tokens: int,
) -> Int[Tensor, "B 1 T"]:
    """Give each token one number, for a model whose config asks for one row.

    Rows with stays (those answered at [MASK]) hold the mask's position throughout the
    answer; the others (at [gMASK]) count on.

    Source: ChatGLM-6B `get_position_ids` with `position_encoding_2d=False`.
    """
    index = torch.arange(num_tokens, device=contexts.device)
    held = (index >= contexts[:, None]) & stays[:, None]
    return torch.where(held, masks[:, None], index)[:, None]


def prompt_positions(
    tokens: Int[Tensor, "B T"], ids: BlankIds, rows: int
) -> Int[Tensor, "B rows T"]:
    """Read off the ids where each token of a prompt stands, in 2 rows or in 1.

    Raises:
        ValueError: a row without <sop>, or with neither [MASK] nor [gMASK].

    Source: ChatGLM-6B `ChatGLMModel.forward`, position_ids is None.
    """
    contexts = context_lengths(tokens, ids.sop)
    masks = mask_positions(tokens, ids.gmask, ids.mask)
    if rows == 2:
        return blank_positions(contexts, masks, tokens.shape[1])
    stays = (tokens != ids.gmask).all(dim=-1)
    return blank_positions_1d(contexts, masks, stays, tokens.shape[1])


def answer_advance(
    tokens: Int[Tensor, "B T"], ids: BlankIds, rows: int
) -> Int[Tensor, "B rows"]:
    """How far the positions move from one token of an answer to the next.

    In two rows only the second moves. One row moves unless the answer is at [MASK];
    there the original's single step stands still for [gMASK] too, so that decoding
    with its cache differs from its forward pass.

    Source: ChatGLM-6B `prepare_inputs_for_generation`.
    """
    if rows == 2:
        return tokens.new_tensor([0, 1]).expand(len(tokens), 2)
    return (tokens == ids.gmask).any(dim=-1, keepdim=True).long()


def _first_index(found: Tensor, what: str) -> Tensor:
    absent = (~found.any(dim=-1)).nonzero().flatten().tolist()
    if absent:
        raise ValueError(f"no {what} in row {', '.join(map(str, absent))}")
    return found.int().argmax(dim=-1)  # of equals, the first
