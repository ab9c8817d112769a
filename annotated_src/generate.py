"""Prefill once, then decode one token at a time. Run it to chat with the real model:

python -m annotated_src.generate "What is a llama?"
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from annotated_src.sampler import Sampler
from annotated_src.sampling import greedy

StopIds = Collection[int] | Sequence[Collection[int]]


def generate(
    model: Any,
    tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop_ids: StopIds = (),
    is_token: Bool[Tensor, "B T"] | None = None,
    positions: Int[Tensor, "B rows T"] | None = None,
    mask: Bool[Tensor, "B 1 T T"] | None = None,
) -> Int[Tensor, "B S"]:
    """Return the prompts and their continuations.

    It ends when every row has drawn one of the stop_ids (the same for all rows, or a
    collection for each), or after max_new_tokens. A row that ends before the others
    repeats its stop id.

    Prompts of different lengths are padded on the left; then the tokenizer's `pad` says
    how: is_token (False at padding) for Llama, positions and mask for ChatGLM.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, padding elsewhere
            than on the left, more tokens in all than the model was made for, or
            stop_ids for another number of rows.

    Source: transformers `GenerationMixin._sample`.
    """
    steps = generate_stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stop_ids=stop_ids,
        is_token=is_token,
        positions=positions,
        mask=mask,
    )
    return torch.cat([tokens, *(step[:, None] for step in steps)], dim=1)


def generate_stream(
    model: Any,
    tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop_ids: StopIds = (),
    is_token: Bool[Tensor, "B T"] | None = None,
    positions: Int[Tensor, "B rows T"] | None = None,
    mask: Bool[Tensor, "B 1 T T"] | None = None,
) -> Iterator[Int[Tensor, "B"]]:
    """Yield each new column of `generate` as soon as it is known."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (B, T), got shape {tuple(tokens.shape)}")
    prompt, limit = tokens.shape[1], model.config.max_seq_len
    if prompt == 0:
        raise ValueError("the prompt has no tokens")
    if max_new_tokens < 0 or prompt + max_new_tokens > limit:
        raise ValueError(
            f"prompt {prompt} + max_new_tokens {max_new_tokens} must be "
            f"0 to {limit} tokens (max_seq_len)"
        )
    stops = _stop_table(stop_ids, tokens)
    given = {"is_token": is_token, "positions": positions, "mask": mask}
    given = {name: value for name, value in given.items() if value is not None}
    if is_token is not None:
        _check_padding(is_token, tokens)
    return _decode(model, tokens, max_new_tokens, sampler, stops, given)


@torch.inference_mode()
def _decode(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    stops: Tensor,
    given: dict[str, Tensor],
) -> Iterator[Tensor]:
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    is_token = given.get("is_token")
    if is_token is not None:  # the sampler sees the row's last token for padding
        tokens = tokens.where(is_token, tokens[:, -1:])
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    last = tokens[:, -1]
    step = tokens  # first the prefill: the whole prompt; from then on, one token
    for _ in range(max_new_tokens):
        logits = model(step, cache, last_logits_only=True, **given)[:, 0]
        last = torch.where(ended, last, sampler(logits, tokens))
        yield last
        # A row that had ended repeats its stop id, so it is found again.
        ended = (last[:, None] == stops).any(dim=1)
        if ended.all():
            return
        step, given = last[:, None], {}
        tokens = torch.cat((tokens, step), dim=1)
        if is_token is not None:
            is_token = F.pad(is_token, (0, 1), value=True)
            given = {"is_token": is_token}


def _stop_table(stop_ids: StopIds, tokens: Tensor) -> Int[Tensor, "B most"]:
    """Write down each row's stop ids; -1, which no token has, fills shorter rows."""
    batch_size = tokens.shape[0]
    per_row = [ids for ids in stop_ids if not isinstance(ids, int)]
    if not per_row:
        per_row = [stop_ids] * batch_size
    elif len(per_row) != len(stop_ids) or len(per_row) != batch_size:
        raise ValueError(
            f"stop_ids must be ids, or {batch_size} collections of ids, one for each "
            f"row, got {stop_ids}"
        )
    rows = [torch.tensor(list(ids), dtype=torch.long) for ids in per_row]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return table.to(tokens.device)


def _check_padding(is_token: Tensor, tokens: Tensor) -> None:
    if is_token.shape != tokens.shape:
        raise ValueError(
            f"is_token must be (B, T) = {tuple(tokens.shape)}, got "
            f"{tuple(is_token.shape)}"
        )
    # Once a token has come, no padding may follow, and the last must be a token.
    wrong = ~is_token[:, -1] | (is_token[:, :-1] & ~is_token[:, 1:]).any(dim=1)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"row {row}: padding must stand on the left, before at least one token, "
            f"got is_token {is_token[row].int().tolist()}"
        )


if __name__ == "__main__":
    from annotated_src.command_line import main

    main()
