"""ChatGLM-6B's tokenizer: SentencePiece, special tokens, and padding of its prompts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from annotated_src import chatglm_text
from annotated_src.masks import hide_padding, prefix_mask
from annotated_src.positions import blank_positions, context_lengths, mask_positions
from annotated_src.shards import read_json

MODEL_FILE = "ice_text.model"
FOUND_IN_TEXT = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")
ROLES = (*FOUND_IN_TEXT, "gmask_token")


class PaddedBatch(NamedTuple):
    """Prompts of several lengths as one input of the model."""

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B 2 T"]
    mask: Bool[Tensor, "B 1 T T"]


class ChatGLMTokenizer:
    """A SentencePiece model and the names of its special tokens.

    Special tokens are found in a text too, but for [gMASK], a role that transformers
    does not know: written in a text, it is cut like any word.

    Raises:
        ValueError: a name that is no piece of the model.

    Source: ChatGLM-6B `ChatGLMTokenizer`; transformers 4.27 `PreTrainedTokenizer`.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        names: Mapping[str, str],
        num_image_tokens: int = 0,
    ) -> None:
        self.processor = processor
        self.num_image_tokens = num_image_tokens  # their ids come before those of text
        self.vocab_size = num_image_tokens + processor.get_piece_size()
        self.sop_id = self.id_of(names["bos_token"])
        self.eos_id = self.id_of(names["eos_token"])
        self.mask_id = self.id_of(names["mask_token"])
        self.gmask_id = self.id_of(names["gmask_token"])
        self.pad_id = self.id_of(names["pad_token"])
        self.special = [names[role] for role in FOUND_IN_TEXT]
        self.special_ids = [self.id_of(name) for name in self.special]

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "ChatGLMTokenizer":
        """Read ice_text.model and tokenizer_config.json from a directory.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: one of them is damaged, a special token is not named or not
                there, or the text is to be changed in a way that ChatGLM-6B does not.
        """
        directory = Path(path)
        config = read_json(directory / "tokenizer_config.json")
        for role in ROLES:
            if not isinstance(name := config.get(role), str):
                raise ValueError(f"{directory}: {role} is {name!r}, not a string")
        for change in ("do_lower_case", "remove_space"):
            if config.get(change):
                raise ValueError(f"{directory}: {change} is on, expected it off")
        # Early checkpoints keep ids for images and do not say so.
        images = config.get("num_image_tokens", 20000)
        if not isinstance(images, int) or images < 0:
            raise ValueError(f"{directory}: num_image_tokens is {images!r}, not 0 up")
        names = {role: config[role] for role in ROLES}
        return cls(_read_processor(directory / MODEL_FILE), names, images)

    def id_of(self, piece: str) -> int:
        """Look up one piece.

        Raises:
            ValueError: the SentencePiece model does not have it.
        """
        found = self.processor.piece_to_id(piece)
        if self.processor.id_to_piece(found) != piece:
            raise ValueError(f"the SentencePiece model has no piece {piece!r}")
        return self.num_image_tokens + found

    def pieces(self, text: str) -> list[str]:
        """Cut a text into pieces, special tokens whole.

        What stands between special tokens loses the whitespace beside them, and is a
        text of its own: SentencePiece puts a space, written ▁, in front of each.
        """
        special = "|".join(map(re.escape, self.special))
        chunks = re.split(f"({special})", text)  # text, special, text, ..., text
        found = []
        for i, chunk in enumerate(chunks):
            if i % 2:
                found.append(chunk)
                continue
            chunk = chunk.lstrip() if i > 0 else chunk
            chunk = chunk.rstrip() if i < len(chunks) - 1 else chunk
            chunk = chatglm_text.mark_whitespace(chunk)
            found += self.processor.encode(chunk, out_type=str)
        return found

    def encode_text(self, text: str) -> list[int]:
        """Turn a text into ids, without the special tokens of a prompt."""
        found = self.processor.piece_to_id(self.pieces(text))
        return [self.num_image_tokens + i for i in found]

    def encode(self, text: str, answer: str | None = None) -> Int[Tensor, "1 T"]:
        """Turn a text into a prompt, `text [gMASK] <sop>`; or add `answer <eop>`.

        [gMASK] is added even where the text has a mask of its own.

        Source: ChatGLM-6B `build_inputs_with_special_tokens`.
        """
        ids = [*self.encode_text(text), self.gmask_id, self.sop_id]
        if answer is not None:
            ids += [*self.encode_text(answer), self.eos_id]
        return torch.tensor([ids], dtype=torch.long)

    def decode(
        self, ids: Sequence[int] | Int[Tensor, "T"], skip_special: bool = False
    ) -> str:
        """Turn ids into text; special tokens show nothing, but `<unk>` shows " ⁇ ".

        With skip_special it shows nothing either. Early ids are images: `<image_7>`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        skipped = self.special_ids if skip_special else [self.pad_id]
        pieces = [self._piece(int(i)) for i in ids if int(i) not in skipped]
        return chatglm_text.clean_up(self.processor.decode(pieces))

    def settled(self, text: str) -> str:
        """Leave out the end of a text that more ids may still change."""
        return chatglm_text.settled(text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Int[Tensor, "1 T"]:
        """Turn a conversation into ids, ending where the assistant's answer begins.

        Raises:
            ValueError: the roles are not user, assistant, user, ..., user.
        """
        query, history = chatglm_text.split_rounds(messages)
        return self.encode(chatglm_text.chat_prompt(query, history))

    def pad(self, rows: Sequence[Int[Tensor, "1 _"]]) -> PaddedBatch:
        """Make one input of several prompts: each as it is alone, moved to the right.

        Padding has position 0, sees nothing and is not seen.

        Raises:
            ValueError: no rows, or one without `<sop>` or without a mask token.

        Source: ChatGLM-6B `ChatGLMTokenizer._pad`.
        """
        if not rows:
            raise ValueError("there are no rows to pad")
        longest = max(row.shape[1] for row in rows)
        padding = torch.tensor([[longest - row.shape[1]] for row in rows])  # (B, 1)
        is_token = torch.arange(longest) >= padding  # (B, T)
        tokens = torch.full(is_token.shape, self.pad_id)
        tokens[is_token] = torch.cat(list(rows), dim=1)[0]
        contexts = context_lengths(tokens, self.sop_id)
        masks = mask_positions(tokens, self.mask_id, self.gmask_id)
        places, steps = blank_positions(contexts, masks, longest).unbind(dim=1)
        places = (places - padding).clamp(min=0)
        mask = hide_padding(prefix_mask(contexts, longest), is_token)
        return PaddedBatch(tokens, torch.stack((places, steps), dim=1), mask)

    def _piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is not in 0 to {self.vocab_size - 1}")
        if token < self.num_image_tokens:
            return f"<image_{token}>"
        return self.processor.id_to_piece(token - self.num_image_tokens)


def _read_processor(path: Path) -> SentencePieceProcessor:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    return processor
