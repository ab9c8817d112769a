import json
import random
from pathlib import Path

import pytest

from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.training_text import (
    hold_out,
    passages,
    read_chapters,
    train_tokenizer,
)

VERSES = {
    "Ruth 1:1": "# Now it came to pass in the days when the judges ruled,",
    "Ruth 1:2": "that there was a famine in the land.",
    "Ruth 2:1": "And Naomi had a kinsman [of hers], a mighty man of wealth.",
    "1 John 1:1": "That which was from the beginning,",
    "1 John 1:2": "(For the life was manifested,)",
}


@pytest.fixture
def verses_json(tmp_path):
    path = tmp_path / "verses.json"
    path.write_text(json.dumps(VERSES), encoding="utf-8")
    return path


def test_verses_are_gathered_by_chapter_without_marks(verses_json):
    assert read_chapters(verses_json) == [
        [
            "Now it came to pass in the days when the judges ruled,",
            "that there was a famine in the land.",
        ],
        ["And Naomi had a kinsman of hers, a mighty man of wealth."],
        ["That which was from the beginning,", "(For the life was manifested,)"],
    ]


def test_one_chapter_of_fifty_is_held_out():
    chapters = [[f"verse of {i}"] for i in range(130)]
    trained, tested = hold_out(chapters)
    assert tested == [["verse of 25"], ["verse of 75"], ["verse of 125"]]
    assert trained == [c for c in chapters if c not in tested]


def test_passages_cover_a_chapter_in_one_or_two_verses():
    chapter = [f"v{i}" for i in range(500)]
    texts = list(passages(chapter, random.Random(0)))
    assert " ".join(texts).split() == chapter
    assert {len(text.split()) for text in texts} == {1, 2}
    assert texts != list(passages(chapter, random.Random(1)))
    assert list(passages([], random.Random(0))) == []


def test_the_tokenizer_reads_back_what_it_learnt_from(tmp_path):
    texts = list(VERSES.values())
    train_tokenizer(texts, tmp_path, vocab_size=140)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 140
    for text in texts:
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    spaced = "a\nb\tc     d"
    assert tokenizer.decode(tokenizer.encode_text(spaced)) == spaced


def test_special_pieces_stand_where_the_golden_toy_has_them(tmp_path):
    golden = Path(__file__).parent / "golden" / "chatglm6b" / "tokenizer.json"
    pieces = json.loads(golden.read_text("utf-8"))["pieces"][:93]
    assert pieces[-1] == "<|blank_80|>"
    train_tokenizer(list(VERSES.values()), tmp_path, vocab_size=140)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert [tokenizer.processor.id_to_piece(i) for i in range(93)] == pieces


def test_a_vocabulary_of_impossible_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 99: "):
        train_tokenizer(list(VERSES.values()), tmp_path, vocab_size=99)
    assert not list(tmp_path.iterdir())
