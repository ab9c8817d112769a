"""Text to ids and back, and conversations to text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from torch import Tensor

from annotated_src.chat_template import read_template, render_chat
from annotated_src.chatglm_tokenizer import MODEL_FILE, ChatGLMTokenizer
from annotated_src.shards import read_json

# What bytes that are not yet a character decode to.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A byte as some vocabularies write it; a run of them decodes only as a whole.
BYTE = re.compile("<0x[0-9A-F]{2}>")
ROLES = [f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class TextBatch(NamedTuple):
    """Texts of several lengths as one input of the model, padded on the left."""

    tokens: Int[Tensor, "B T"]
    is_token: Bool[Tensor, "B T"]


class TextTokenizer:
    """A tokenizer of the tokenizers library, with the chat template beside it.

    special_tokens names further roles, such as bos_token; eos_token serves for padding
    where there is no pad_token.

    Raises:
        ValueError: a token to begin, end or pad with is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        eos_token: str,
        **special_tokens: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.special_tokens: dict[str, Any] = {"eos_token": eos_token, **special_tokens}
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.eos_id = self.id_of(eos_token, "end")
        self.pad_id = self.id_of(special_tokens.get("pad_token", eos_token), "pad")
        bos_token = special_tokens.get("bos_token")
        self.bos_id = None if bos_token is None else self.id_of(bos_token, "begin")

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "TextTokenizer":
        """Read tokenizer.json and tokenizer_config.json from a directory.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: one of them is damaged, or names no end token.
        """
        directory = Path(path)
        config = read_json(directory / "tokenizer_config.json")
        special = {role: _token(directory, role, config.get(role)) for role in ROLES}
        if special["eos_token"] is None:
            raise ValueError(f"{directory}: eos_token is None, not a string")
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        named = {role: token for role, token in special.items() if token is not None}
        return cls(tokenizer, read_template(directory, config), **named)

    def id_of(self, token: str, purpose: str) -> int:
        """Look up a special token; raise ValueError if the vocabulary lacks it."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary has no {purpose} token {token!r}")
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> Int[Tensor, "1 T"]:
        """Turn text into one row of ids, special tokens in it included.

        With add_special_tokens, put around it what tokenizer.json says, often one token
        in front; a chat template writes its own. A byte that the vocabulary lacks is
        dropped (SmolLM2's lacks some controls).

        Raises:
            ValueError: half of a surrogate pair, which is no character.
        """
        text.encode("utf-8")  # of a lone surrogate the library says it is no string
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return torch.tensor([ids], dtype=torch.long)

    def decode(self, ids: Sequence[int] | Int[Tensor, "T"]) -> str:
        """Turn ids into text, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def settled(self, text: str) -> str:
        """Return the text: more ids change nothing of it."""
        return text

    def pad(self, rows: Sequence[Int[Tensor, "1 _"] | Int[Tensor, "_"]]) -> TextBatch:
        """Make one input of several texts, filled up on the left: they end together.

        Raises:
            ValueError: no rows, or one that is empty or no single row.
        """
        if not rows:
            raise ValueError("there are no rows to pad")
        for i, row in enumerate(rows):
            if row.numel() == 0 or row.numel() != row.shape[-1]:
                raise ValueError(f"row {i} is {tuple(row.shape)}, not (T) or (1, T)")
        lengths = torch.tensor([[row.numel()] for row in rows])  # (B, 1)
        longest = int(lengths.max())
        is_token = torch.arange(longest) >= longest - lengths  # (B, T)
        tokens = torch.full(is_token.shape, self.pad_id)
        tokens[is_token] = torch.cat([row.flatten() for row in rows])
        return TextBatch(tokens, is_token)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Int[Tensor, "1 T"]:
        """Turn a conversation into ids, ending where the assistant's answer begins.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        text = render_chat(self.chat_template, messages, **self.special_tokens)
        return self.encode(text)


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
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: {error}") from error
    # A file can hold the habits of its training, to cut and to fill up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token(directory: Path, role: str, entry: Any) -> str | None:
    """Read `"</s>"` or `{"content": "</s>", ...}`."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{directory}: {role} is {entry!r}, not a string")
    return token


def stream_text(
    tokenizer: TextTokenizer | ChatGLMTokenizer, ids: Iterable[int]
) -> Iterator[str]:
    """Yield text as ids arrive, never half a character.

    A character can span several ids (an emoji takes up to four bytes), so text is held
    back while its last character is incomplete, or while the tokenizer may change it.
    """
    window: list[int] = []  # ids that are decoded together
    known = 0  # how many of them have been shown
    shown = latest = ""
    for token in ids:
        window.append(token)
        before, latest = latest, tokenizer.decode(window)
        half = latest.endswith(REPLACEMENT) or _may_go_on(tokenizer, token)
        if half or latest == before:  # a special token leaves held back what was
            continue
        text = tokenizer.settled(latest)
        yield text[len(shown) :]
        if isinstance(tokenizer, TextTokenizer) and text != shown:
            # Older ids no longer matter. Those just shown do: they stand in front, so
            # that the next id is not taken for the first, which may lose its space.
            del window[:known]
            known, text = len(window), tokenizer.decode(window)
        shown = latest = text
    yield tokenizer.decode(window)[len(shown) :]


def _may_go_on(tokenizer: TextTokenizer | ChatGLMTokenizer, token: int) -> bool:
    """Tell whether a run of bytes ends here, which decodes all or not at all."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        return False
    return BYTE.fullmatch(tokenizer.tokenizer.id_to_token(token) or "") is not None
