"""Text to ids and back, and conversations to text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.sandbox
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from annotated_src.chatglm_tokenizer import MODEL_FILE, ChatGLMTokenizer
from annotated_src.shards import read_json

# What bytes that are not yet a character decode to.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """A tokenizer of the tokenizers library, with the chat template beside it."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, eos_token: str
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"the vocabulary has no end token {eos_token!r}")
        self.eos_id = eos_id

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "TextTokenizer":
        """Read tokenizer.json and tokenizer_config.json from a directory.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: one of them is damaged, or names no end token.
        """
        directory = Path(path)
        config = read_json(directory / "tokenizer_config.json")
        eos_token, template = config.get("eos_token"), config.get("chat_template")
        if not isinstance(eos_token, str):
            raise ValueError(f"{directory}: eos_token is {eos_token!r}, not a string")
        if (own_file := directory / "chat_template.jinja").exists():
            template = own_file.read_text("utf-8")
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        return cls(tokenizer, template, eos_token)

    def encode(self, text: str) -> Int[Tensor, "1 T"]:
        """Turn text into one row of ids; nothing is added in front or behind.

        A byte that the vocabulary lacks is dropped (SmolLM2's lacks some controls).
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor([ids], dtype=torch.long)

    def decode(self, ids: Sequence[int] | Int[Tensor, "T"]) -> str:
        """Turn ids into text, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def settled(self, text: str) -> str:
        """Return the text: more ids change nothing of it."""
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Int[Tensor, "1 T"]:
        """Turn a conversation into ids, ending where the assistant's answer begins.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        return self.encode(render_chat(self.chat_template, messages))


def load_tokenizer(path: Path | str) -> TextTokenizer | ChatGLMTokenizer:
    """Read the tokenizer that a directory holds.

    Raises:
        FileNotFoundError: it holds none, or lacks a file beside it.
        ValueError: a file is damaged.
    """
    kinds = {"tokenizer.json": TextTokenizer, MODEL_FILE: ChatGLMTokenizer}
    for name, kind in kinds.items():
        if (Path(path) / name).exists():
            return kind.from_pretrained(path)
    raise FileNotFoundError(f"no {' and no '.join(kinds)} in {path}")


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: {error}") from error


def render_chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation out as the text that the model was trained on.

    Templates come with checkpoints, from strangers, so they run in a sandbox.

    Raises:
        ValueError: the template is not valid, or refuses the messages.

    Source: transformers `PreTrainedTokenizerBase.apply_chat_template`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from error


def stream_text(
    tokenizer: TextTokenizer | ChatGLMTokenizer, ids: Iterable[int]
) -> Iterator[str]:
    """Yield text as ids arrive, never half a character.

    A character can span several ids (an emoji takes up to four bytes), so text is held
    back while its last character is incomplete, or while the tokenizer may change it.
    """
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith(REPLACEMENT):
            text = tokenizer.settled(text)
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]
