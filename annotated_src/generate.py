"""Prefill once, then decode one token at a time. Run it to chat with the real model:

python -m annotated_src.generate "What is a llama?"
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import load_model
from annotated_src.sampling import greedy
from annotated_src.tokenizer import load_tokenizer, stream_text
from annotated_src.weights import WeightsError, smollm2

Sampler = Callable[[Float[Tensor, "B V"]], Int[Tensor, "B"]]


def generate(
    model: Any,
    tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop_ids: Collection[int] = (),
    positions: Int[Tensor, "B rows T"] | None = None,
    mask: Bool[Tensor, "B 1 T T"] | None = None,
) -> Int[Tensor, "B S"]:
    """Return the prompt and its continuation.

    It ends when every row has drawn a stop id, or after max_new_tokens. A row that ends
    before the others repeats its stop id. ChatGLM takes positions and mask of a padded
    prompt from its tokenizer.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or more tokens in all
            than the model was made for.

    Source: transformers `GenerationMixin._sample`.
    """
    steps = generate_stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stop_ids=stop_ids,
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
    stop_ids: Collection[int] = (),
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
    given = {"positions": positions, "mask": mask}
    given = {name: value for name, value in given.items() if value is not None}
    return _decode(model, tokens, max_new_tokens, sampler, list(stop_ids), given)


@torch.inference_mode()
def _decode(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: list[int],
    given: dict[str, Tensor],
) -> Iterator[Tensor]:
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    stops = torch.tensor(stop_ids, dtype=tokens.dtype, device=tokens.device)
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    last = tokens[:, -1]
    step = tokens  # first the prefill: the whole prompt; from then on, one token
    for _ in range(max_new_tokens):
        logits = model(step, cache, **given)[:, -1]
        last = torch.where(ended, last, sampler(logits))
        yield last
        ended = torch.isin(last, stops)  # a row that had ended repeats its stop id
        if ended.all():
            return
        step, given = last[:, None], {}


def main() -> None:
    """Answer one prompt, word by word."""
    parser = argparse.ArgumentParser(prog="python -m annotated_src.generate")
    parser.add_argument("path", nargs="?", type=Path, help="a model; default SmolLM2")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args()
    try:
        directory = options.path or smollm2()
        model = load_model(directory)
        tokenizer = load_tokenizer(directory)
        tokens = tokenizer.chat([{"role": "user", "content": options.prompt}])
        given: dict[str, Any] = {}
        if isinstance(tokenizer, ChatGLMTokenizer):
            _, positions, mask = tokenizer.pad([tokens])
            given = {"positions": positions, "mask": mask}
        new_ids = generate_stream(
            model,
            tokens,
            max_new_tokens=options.max_new_tokens,
            stop_ids=[tokenizer.eos_id],
            **given,
        )
        for piece in stream_text(tokenizer, (int(row) for row in new_ids)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except (WeightsError, FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
