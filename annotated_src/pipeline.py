"""From a prompt to its answer in three steps: preprocess, forward, postprocess."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from annotated_src.chatglm_tokenizer import ChatGLMTokenizer, PaddedBatch
from annotated_src.checkpoint import load_model
from annotated_src.generate import generate, generate_stream
from annotated_src.sampler import Sampler
from annotated_src.sampling import greedy
from annotated_src.shards import read_json
from annotated_src.tokenizer import (
    TextBatch,
    TextTokenizer,
    load_tokenizer,
    stream_text,
)

Message = Mapping[str, str]  # of a conversation: its role and its content
Prompt = str | Sequence[Message]
AnyTokenizer = TextTokenizer | ChatGLMTokenizer


class TextGeneration:
    """A model and its tokenizer, called with text and answering with text.

    A prompt is a text to be continued, or a conversation (a list of messages, each with
    role and content) to be answered. stop_ids end an answer; without, eos_id does.

    Raises:
        ValueError: the tokenizer has ids that the model's vocabulary does not.

    Source: transformers `TextGenerationPipeline`.
    """

    def __init__(
        self, model: Any, tokenizer: AnyTokenizer, stop_ids: Sequence[int] = ()
    ) -> None:
        if tokenizer.vocab_size > (vocab_size := model.config.vocab_size):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding "
                f"{vocab_size}: they do not belong together"
            )
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = list(stop_ids) or [tokenizer.eos_id]

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TextGeneration":
        """Load what a directory holds: model, tokenizer, and the ids that stop.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: as `load_model` and `load_tokenizer`, or the two do not match.
        """
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype, device)
        return cls(model, tokenizer, read_stop_ids(Path(path), tokenizer))

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 200,
        sampler: Sampler = greedy,
    ) -> str | list[str]:
        """Return the answer, without the prompt; or of several prompts, the answers.

        Several are computed together, each as it would be alone, except that a sampler
        with a generator of its own draws for all of them in turn.

        Raises:
            ValueError: no prompt, an empty one, one that together with max_new_tokens
                is longer than the context, a conversation without a chat template.
        """
        one = _is_one(prompts)
        batch = self.preprocess([prompts] if one else prompts)  # type: ignore[list-item]
        ids = self.forward(batch, max_new_tokens=max_new_tokens, sampler=sampler)
        answers = self.postprocess(ids)
        return answers[0] if one else answers

    def preprocess(self, prompts: Sequence[Prompt]) -> TextBatch | PaddedBatch:
        """Turn prompts into ids, padded on the left to one length."""
        return self.tokenizer.pad([self.encode(prompt) for prompt in prompts])

    def encode(self, prompt: Prompt) -> Int[Tensor, "1 T"]:
        """Turn one prompt into ids.

        Raises:
            ValueError: there are none, or a conversation is refused.
        """
        if not isinstance(prompt, str):
            ids = self.tokenizer.chat(prompt)
        elif isinstance(self.tokenizer, ChatGLMTokenizer):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        if not ids.numel():
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        return ids

    def forward(
        self, batch: TextBatch | PaddedBatch, **options: Any
    ) -> Int[Tensor, "B new"]:
        """Generate the ids that follow each prompt; options go to `generate`."""
        given = self._on_device(batch)
        ids = generate(self.model, stop_ids=self.stop_ids, **given, **options)
        return ids[:, batch.tokens.shape[1] :].cpu()

    def postprocess(self, ids: Int[Tensor, "B new"]) -> list[str]:
        """Turn what follows each prompt into text, up to its stop id."""
        answers = []
        for new in ids.tolist():
            ends = (i for i, token in enumerate(new) if token in self.stop_ids)
            kept = new[: next(ends, len(new))]
            answers.append("".join(stream_text(self.tokenizer, kept)))
        return answers

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 200, sampler: Sampler = greedy
    ) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece, as it comes."""
        columns = generate_stream(
            self.model,
            stop_ids=self.stop_ids,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            **self._on_device(self.preprocess([prompt])),
        )
        new = (int(column) for column in columns)
        return stream_text(self.tokenizer, (i for i in new if i not in self.stop_ids))

    def _on_device(self, batch: TextBatch | PaddedBatch) -> dict[str, Tensor]:
        device = self.model.embedding.weight.device
        return {name: value.to(device) for name, value in batch._asdict().items()}


def read_stop_ids(directory: Path, tokenizer: AnyTokenizer) -> list[int]:
    """List the ids that end an answer.

    generation_config.json has the first word, which may be several ids; then the
    tokenizer's end token.

    Raises:
        ValueError: eos_token_id is neither an id nor a list of ids.

    Source: transformers `GenerationConfig.eos_token_id`.
    """
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        return [tokenizer.eos_id]
    ids = found if isinstance(found, list) else [found]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(
            f"{path}: eos_token_id is {found!r}, not an id or a list of ids"
        )
    return ids


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Tell a text or a list of messages from a list of prompts."""
    return isinstance(prompts, str) or isinstance(next(iter(prompts), None), Mapping)
