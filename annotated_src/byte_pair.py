"""A byte-level byte-pair encoder, written to be read: text to ids and back.

The tokenizers library does the same, faster.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from annotated_src.byte_alphabet import to_bytes, to_visible
from annotated_src.shards import read_json

# GPT-2's pieces: an English ending; letters, digits or marks, with the one space before
# them; spaces, but for the last one before a word.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
# Settings of a tokenizer.json that must be off.
NOT_DONE = (
    "dropout",
    "unk_token",
    "byte_fallback",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)


def cut_pieces(text: str, patterns: Sequence[str]) -> list[str]:
    """Cut a text into pieces that no merge may cross: its matches and what is between.

    Each further pattern cuts the pieces of the one before.
    """
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _cut(piece, pattern) if part]
    return pieces


def _cut(piece: str, pattern: str) -> Iterator[str]:
    end = 0
    for match in regex.finditer(pattern, piece):
        yield from (piece[end : match.start()], match.group())
        end = match.end()
    yield piece[end:]


class BytePairEncoder:
    """A vocabulary, the merges in the order they were learnt, and special tokens.

    ranks: the pair that was learnt first has the lowest, and is merged first.

    Raises:
        ValueError: a merge gives a token that the vocabulary does not have.

    Source: Sennrich et al. 2016; tokenizers `BPE::merge_word`.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Mapping[str, int],
        patterns: Sequence[str] = (WORDS,),
        whole_words: bool = False,
    ) -> None:
        self.vocabulary, self.special = dict(vocabulary), dict(special)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.patterns, self.whole_words = patterns, whole_words
        for pair in merges:
            if "".join(pair) not in vocabulary:
                raise ValueError(f"merge {pair!r}: no such token in the vocabulary")
        # The longest first: of two that begin alike, it wins.
        longest = map(regex.escape, sorted(special, key=len, reverse=True))
        self.cut_special = regex.compile(f"({'|'.join(longest) or '(?!)'})")
        self.texts = {i: to_bytes(token) for token, i in vocabulary.items()}
        self.texts |= {i: token.encode("utf-8") for token, i in special.items()}

    @classmethod
    def from_file(cls, path: Path | str) -> "BytePairEncoder":
        """Read a tokenizer.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, or does what this encoder does not.
        """
        content = read_json(Path(path))
        try:
            _refuse_other_kinds(content)
            model = content["model"]
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return cls(
                model["vocab"],
                [(left, right) for left, right in pairs],
                {token["content"]: token["id"] for token in content["added_tokens"]},
                _read_patterns(content["pre_tokenizer"]),
                bool(model.get("ignore_merges")),
            )
        except KeyError as error:
            raise ValueError(f"{path}: has no {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Turn text into ids: special tokens first, then pieces, bytes and merges."""
        ids = []
        for i, chunk in enumerate(self.cut_special.split(text)):
            if i % 2:  # text, special, text, ..., text
                ids.append(self.special[chunk])
                continue
            for piece in cut_pieces(chunk, self.patterns):
                ids += [self.vocabulary[token] for token in self.tokens_of(piece)]
        return ids

    def tokens_of(self, piece: str) -> list[str]:
        """Merge one piece as far as it goes."""
        if self.whole_words and (whole := to_visible(piece)) in self.vocabulary:
            return [whole]
        *_, tokens = self.merges_of(piece)
        return tokens

    def merges_of(self, piece: str) -> Iterator[list[str]]:
        """Yield the tokens of one piece after each merge, from single bytes on.

        A byte that the vocabulary lacks is dropped.
        """
        tokens = [char for char in to_visible(piece) if char in self.vocabulary]
        yield tokens
        while found := [
            (self.ranks[pair], i)
            for i, pair in enumerate(pairwise(tokens))
            if pair in self.ranks
        ]:
            _, at = min(found)  # the lowest rank; of equal ones the leftmost
            tokens = [*tokens[:at], tokens[at] + tokens[at + 1], *tokens[at + 2 :]]
            yield tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text, special tokens included; what is no character shows �.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        ids = list(ids)
        if unknown := [i for i in ids if i not in self.texts]:
            raise ValueError(f"id {unknown[0]} is not in the vocabulary")
        return b"".join(self.texts[i] for i in ids).decode("utf-8", errors="replace")


def _refuse_other_kinds(content: Mapping[str, Any]) -> None:
    """Raise ValueError where a file asks for more than bytes, pieces and merges."""
    model, decoder = content["model"], content["decoder"]
    found = {"model": model["type"], "decoder": decoder and decoder["type"]}
    if found != {"model": "BPE", "decoder": "ByteLevel"}:
        raise ValueError(f"{found}, expected BPE and ByteLevel")
    for name in NOT_DONE:
        if model.get(name):
            raise ValueError(f"model.{name} is {model[name]!r}, expected none")
    if content["normalizer"]:
        raise ValueError(f"normalizer is {content['normalizer']!r}, expected none")
    for token in content["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise ValueError(f"token {token!r} looks at what stands beside it")


def _read_patterns(step: Mapping[str, Any] | None) -> list[str]:
    """Read where a pre_tokenizer cuts; it must end in bytes, and add no space."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    patterns = []
    for i, kind in enumerate(steps):
        match kind, i == len(steps) - 1:
            case {"type": "Digits", "individual_digits": alone}, False:
                patterns.append(DIGIT if alone else f"{DIGIT}+")
            case {"type": "Split", "behavior": "Isolated", "invert": False}, False:
                given = kind["pattern"]
                patterns.append(given.get("Regex") or regex.escape(given["String"]))
            case {"type": "ByteLevel", "add_prefix_space": False}, True:
                patterns += [WORDS] if kind.get("use_regex", True) else []
            case _:
                raise ValueError(f"step {i} of pre_tokenizer is {kind!r}")
    return patterns
