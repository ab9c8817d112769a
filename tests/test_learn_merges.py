import json
from itertools import pairwise
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from annotated_src.byte_alphabet import visible_bytes
from annotated_src.byte_pair import BytePairEncoder
from annotated_src.learn_merges import join_pair, learn_merges

TEXTS = [topics["for"], topics["while"], topics["if"], topics["try"]]
CHINESE = ["你好世界，你好吗？世界很大。", "aaaa aaa aa 🦙🦙🦙 ------ \n\n\n"]


def library(texts, count):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges]


@pytest.mark.parametrize("texts", [TEXTS, CHINESE], ids=["english", "chinese"])
def test_the_merges_are_those_of_the_library(texts):
    merges = learn_merges(texts, 60)
    assert merges == library(texts, 60)


def test_it_ends_where_no_pair_is_left():
    assert learn_merges(["ab ab"], 9) == [("a", "b"), ("Ġ", "ab")]
    assert learn_merges([], 3) == []


def test_of_equals_the_older_parts_go_first():
    assert learn_merges(["dc ba"], 1) == [("b", "a")]
    assert learn_merges(["xy xy zab zab zab"], 2) == [("a", "b"), ("z", "ab")]


def test_what_is_learnt_encodes():
    merges = learn_merges(TEXTS, 40)
    alphabet = list(visible_bytes().values())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *map("".join, merges)])
    }
    encoder = BytePairEncoder(vocabulary, merges, {})
    lengths = []
    for count in range(0, 41, 10):
        shorter = BytePairEncoder(vocabulary, merges[:count], {})
        ids = shorter.encode(TEXTS[0])
        assert shorter.decode(ids) == TEXTS[0]
        lengths.append(len(ids))
    assert lengths[0] == len(TEXTS[0].encode())
    assert all(after < before for before, after in pairwise(lengths))
    assert lengths[-1] == len(encoder.encode(TEXTS[0]))


def test_pairs_are_joined_from_the_left():
    assert join_pair(list("aaa"), ("a", "a")) == ["aa", "a"]
    assert join_pair(["ab", "c", "ab"], ("ab", "c")) == ["abc", "ab"]
    assert join_pair([], ("a", "b")) == []
