import json
from itertools import islice
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from annotated_src.byte_alphabet import to_visible, visible_bytes
from annotated_src.byte_pair import (
    WORDS,
    BytePairEncoder,
    cut_pieces,
)
from annotated_src.gguf_to_hf import convert_gguf

TEXTS = {
    "english": "The for statement isn't it?  I'll say they've 3.14159 of them\n\n\tx",
    "chinese": "你好，世界。这是一个测试，１２３个字。",
    "emoji": "a 🦙 and 👩‍👩‍👧 👍🏽 🇬🇧",
    "marks": "e\u0301 é ñ n\u0303 क्षि ảẩ",
    "controls": "".join(map(chr, range(0x250))),
    "spaces": " \u2003 x\u0085\x1c \x1f y\u180e  z\u3000\u00a0 ",
    "special": "<|im_start|>user\n<|im_end|><|im_start|<|endoftext|>",
    "numbers": "١٢٣ ½ Ⅷ 二十 12ab3 4",
    "empty": "",
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def file(make_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_pair") / "small"
    convert_gguf(make_gguf().path, folder, progress=lambda line: None)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def pair(file):
    """Ours and the library's, of the small tokenizer: few merges, all bytes."""
    return BytePairEncoder.from_file(file), Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def real(smollm2_dir):
    path = smollm2_dir / "tokenizer.json"
    return BytePairEncoder.from_file(path), Tokenizer.from_file(str(path))


def same_ids(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    return ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_equal_the_library(pair, text):
    ids = same_ids(pair, text)
    assert pair[0].decode(ids) == text  # all bytes are in this vocabulary


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_of_the_real_vocabulary_equal_the_library(real, text):
    same_ids(real, text)


@pytest.mark.parametrize("topic", list(topics)[::9])
def test_real_text(real, topic):
    ids = same_ids(real, topics[topic])
    assert real[0].decode(ids) == topics[topic]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text(pair, text):
    same_ids(pair, text)


@given(st.text(" \n\t'stre12aéЖ你🦙\u0301\u200d<|>im_"))
def test_any_text_of_the_real_vocabulary(real, text):
    same_ids(real, text)


@given(st.lists(st.integers(0, 300)))
def test_any_ids_decode_as_in_the_library(pair, ids):
    """Most are no UTF-8; what stands for broken characters agrees, too."""
    ours, theirs = pair
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_bytes_have_characters_that_one_can_see():
    table = visible_bytes()
    assert sorted(table) == list(range(256))
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert all(char.isprintable() and not char.isspace() for char in table.values())
    by_library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS.values():
        expected = "".join(part for part, _ in by_library.pre_tokenize_str(text))
        assert to_visible(text) == expected
    assert to_visible(" é\n") == "ĠÃ©Ċ"


def test_pieces_keep_every_character():
    pieces = cut_pieces("It's  12 llamas!", [r"\p{N}", WORDS])
    assert pieces == ["It", "'s", "  ", "1", "2", " llamas", "!"]
    assert cut_pieces("", [r"a"]) == []


def test_merges_go_by_rank_and_not_by_length():
    """The longest token in front would be `abc`."""
    merges = [("b", "c"), ("bc", "d"), ("a", "b"), ("ab", "c")]
    tokens = {"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4, "bcd": 5, "ab": 6, "abc": 7}
    encoder = BytePairEncoder(tokens, merges, {})
    stages = [["a", "b", "c", "d"], ["a", "bc", "d"], ["a", "bcd"]]
    assert list(encoder.merges_of("abcd")) == stages
    assert encoder.encode("abcd") == [0, 5]
    library = Tokenizer(models.BPE(tokens, merges))
    assert library.encode("abcd").ids == [0, 5]


@given(st.text("ab", max_size=12), st.permutations(range(6)))
def test_ranks_in_any_order(text, order):
    """In a table that no training would give: one at a time, the leftmost first."""
    pairs = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a"), ("ab", "ab"), ("b", "ab")]
    merges = [pairs[i] for i in order]
    tokens = {t: i for i, t in enumerate({"a", "b", *("".join(p) for p in pairs)})}
    ours = BytePairEncoder(tokens, merges, {})
    assert ours.encode(text) == Tokenizer(models.BPE(tokens, merges)).encode(text).ids


def test_each_stage_is_one_merge(real):
    encoder, _ = real
    stages = list(encoder.merges_of(" tokenization"))
    assert stages[0] == list("Ġtokenization")
    assert [len(stage) for stage in stages] == list(range(13, 13 - len(stages), -1))
    assert all("".join(stage) == "Ġtokenization" for stage in stages)
    used = [
        next(
            tuple(before[i : i + 2])
            for i in range(len(before))
            if "".join(before[i : i + 2]) == after[i] and before[i] != after[i]
        )
        for before, after in zip(stages, islice(stages, 1, None), strict=False)
    ]
    assert all(merge in encoder.ranks for merge in used)


def test_a_byte_that_the_vocabulary_lacks_is_dropped_before_merging():
    encoder = BytePairEncoder({"a": 0, "b": 1, "ab": 2}, [("a", "b")], {})
    assert encoder.encode("axb") == [2]
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    assert library.encode("axb").ids == [2]


def test_of_special_tokens_the_longest_wins():
    special = {"<a>": 1, "<a><b>": 2, "<b>": 3}
    assert BytePairEncoder({}, [], special).encode("<a><b><a><a>") == [2, 1, 1]


def test_a_token_that_is_no_bytes_shows_as_it_is():
    encoder = BytePairEncoder({"a b": 0, "Ġc": 1}, [], {"é<x>": 2})
    assert encoder.decode([0, 1, 2]) == "a b cé<x>"


def test_an_id_that_is_not_there(pair):
    with pytest.raises(ValueError, match="id 99999 is not in the vocabulary"):
        pair[0].decode([0, 99999])


def rewrite(file, folder, change):
    content = json.loads(file.read_text("utf-8"))
    change(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_of_llama_3s_kind(file, tmp_path, as_text, whole):
    """Another pattern; merges as text or as pairs; whole words looked up first."""

    def change(content):
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
        content["pre_tokenizer"] = json.loads(tokenizer.to_str())["pre_tokenizer"]
        model = content["model"]
        model["ignore_merges"] = whole
        model["vocab"]["llama"] = len(model["vocab"]) + 5  # a word without its merges
        if as_text:
            model["merges"] = [" ".join(pair) for pair in model["merges"]]

    path = rewrite(file, tmp_path, change)
    both = BytePairEncoder.from_file(path), Tokenizer.from_file(str(path))
    for text in [*TEXTS.values(), topics["for"]]:
        same_ids(both, text)
    assert (len(both[0].encode("llama")) == 1) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="WordPiece"), "WordPiece"),
        (lambda c: c.update(decoder=None), "'decoder': None"),
        (lambda c: c["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda c: c["model"].update(byte_fallback=True), "byte_fallback is True"),
        (lambda c: c["model"].update(unk_token="<unk>"), "unk_token is '<unk>'"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "</w>"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda c: c["added_tokens"][0].update(lstrip=True), "'lstrip': True"),
        (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer is None"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(), "Digits"),
        (lambda c: c["model"].pop("merges"), "merges"),
        (lambda c: c["model"].update(merges=["a b c"]), "too many values"),
        (lambda c: c["model"]["merges"].append(["Q", "Q"]), "no such token"),
        (lambda c: c.pop("added_tokens"), "has no 'added_tokens'"),
        (lambda c: c.update(model=None), "not subscriptable"),
    ],
)
def test_other_kinds_are_refused_by_name(file, tmp_path, change, message):
    path = rewrite(file, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        BytePairEncoder.from_file(path)


def test_a_space_that_is_added_in_front_is_refused(file, tmp_path):
    def change(content):
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True

    with pytest.raises(ValueError, match=r"step 1 of pre_tokenizer is .*ByteLevel"):
        BytePairEncoder.from_file(rewrite(file, tmp_path, change))


def test_a_missing_or_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        BytePairEncoder.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        BytePairEncoder.from_file(tmp_path / "tokenizer.json")
