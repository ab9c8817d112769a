"""ChatGLM's cache: keys and values, and where in its answer the model is."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from annotated_src.kv_cache import LayerCache
from annotated_src.masks import causal_mask, prefix_mask
from annotated_src.positions import (
    BlankIds,
    answer_advance,
    context_lengths,
    prompt_positions,
)


class AnswerCache(list[LayerCache | None]):
    """A LayerCache for each layer, and what new tokens need to know of the prompt.

    A layer may have None: nothing is kept of it.

    How many tokens came before does not tell a new token its two positions, nor what it
    sees. Both go on from the token before it, so this is kept.
    """

    def __init__(self, layers: Iterable[LayerCache | None]) -> None:
        super().__init__(layers)
        self.positions: Int[Tensor, "B rows"] | None = None  # the last token's
        self.advance: Int[Tensor, "B rows"] | None = None  # from a token to the next
        self.visible: Bool[Tensor, "B S"] | None = None  # what the last token saw

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache, without a prefix of P-tuning; 0 before the prompt."""
        return 0 if self.visible is None else self.visible.shape[1]

    def place(
        self,
        tokens: Int[Tensor, "B T"],
        ids: BlankIds,
        rows: int,
        positions: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Int[Tensor, "B rows T"], Bool[Tensor, "B 1 T S"]]:
        """Say where new tokens stand and what they see, but for what is given.

        A prompt tells by its ids. Tokens after it count on in the answer, see what its
        last token saw, and each other causally.

        Raises:
            ValueError: a prompt without <sop>, or with neither [MASK] nor [gMASK];
                positions or a mask given in another shape; a mask of numbers.
        """
        batch_size, num_tokens = tokens.shape
        if positions is None:
            positions = self._positions(tokens, ids, rows)
        if mask is None:
            mask = self._mask(tokens, ids)
        for name, found, wanted in (
            ("positions", positions, (batch_size, rows, num_tokens)),
            ("mask", mask, (batch_size, 1, num_tokens, self.num_tokens + num_tokens)),
        ):
            if found.shape != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(found.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, True = visible, got {mask.dtype}")
        return positions, mask

    def _positions(self, tokens: Tensor, ids: BlankIds, rows: int) -> Tensor:
        if self.positions is None or self.advance is None:
            return prompt_positions(tokens, ids, rows)
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.positions[..., None] + self.advance[..., None] * steps

    def _mask(self, tokens: Tensor, ids: BlankIds) -> Tensor:
        # Source: ChatGLM-6B `get_masks`, `_update_model_kwargs_for_generation`.
        batch_size, num_tokens = tokens.shape
        if self.visible is None:
            return prefix_mask(context_lengths(tokens, ids.sop), num_tokens)
        before = self.visible[:, None, None].expand(-1, -1, num_tokens, -1)
        among = causal_mask(num_tokens, device=tokens.device)
        return torch.cat((before, among.expand(batch_size, -1, -1, -1)), dim=-1)

    def remember(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B rows T"],
        mask: Bool[Tensor, "B 1 T S"],
        ids: BlankIds,
    ) -> None:
        """Keep what the next tokens need of these."""
        if self.advance is None:
            self.advance = answer_advance(tokens, ids, positions.shape[1])
        self.positions, self.visible = positions[..., -1], mask[:, 0, -1]
