import io
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import PreTrainedTokenizerBase

from annotated_src.chatglm_text import (
    MARKS,
    chat_prompt,
    clean_response,
    clean_up,
    mark_whitespace,
    settled,
    split_rounds,
)
from annotated_src.chatglm_tokenizer import ROLES, ChatGLMTokenizer
from annotated_src.tokenizer import TextTokenizer, load_tokenizer, stream_text

FOLDER = Path(__file__).parent / "golden" / "chatglm6b"
GOLDEN = json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))
CONFIG = GOLDEN["tokenizer_config_of_6b"]
NAMES = {role: CONFIG[role] for role in ROLES}
CASES = [pytest.param(case, id=f"{case['text']:.20}") for case in GOLDEN["cases"]]
TEXTS = [case["text"] for case in GOLDEN["cases"]]

# What the golden file leaves open, by the original's rules in transformers 4.27.1.
BESIDE_SPECIAL = {
    "a [MASK] b": ["▁", "a", "[MASK]", "▁b"],
    "a\n[MASK]\n\n b": ["▁", "a", "[MASK]", "▁b"],
    " a <sop>": ["▁", "▁", "a", "<sop>"],
    "[MASK][MASK] <sop>": ["[MASK]", "[MASK]", "<sop>"],
    "  <sop>  ": ["<sop>"],
    "<unk>x<pad> y<eop>": ["<unk>", "▁", "x", "<pad>", "▁", "y", "<eop>"],
    "a</s>b": ["▁", "a", "</", "s", ">", "b"],
    "o [gMASK] c": ["▁", "o", "▁[", "g", "M", "A", "SK", "]", "▁", "c"],
    "<so<sop>p>": ["▁", "<", "s", "o", "<sop>", "▁", "p", ">"],
}
CLEANED = {
    "你好 . 吗 ? 的 ! n ,": "你好. 吗? 的! n,",
    "x  . y": "x . y",
    "好\n.": "好\n.",
    "<n>a<|tab|>b<|blank_3|>c": "\na\tb   c",
}


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FOLDER / "toy_ice_text.model", tmp_path / "ice_text.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG), "utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return SentencePieceProcessor(model_file=str(FOLDER / "toy_ice_text.model"))


@pytest.fixture
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def in_bytes():
    """A tokenizer with pieces for single bytes and English, as the real model has."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(topics["for"].splitlines() * 3),
        model_writer=written,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=[name for name in NAMES.values() if name != "<unk>"],
        user_defined_symbols=list(MARKS),
        minloglevel=2,
    )
    trained = SentencePieceProcessor(model_proto=written.getvalue())
    return ChatGLMTokenizer(trained, NAMES)


@pytest.mark.parametrize("case", CASES)
def test_pieces_and_ids_are_the_originals(tokenizer, case):
    assert tokenizer.pieces(case["text"]) == case["tokens"]
    assert tokenizer.encode_text(case["text"]) == case["ids_no_special"]
    assert tokenizer.encode(case["text"]).tolist() == [case["ids"]]
    assert tokenizer.encode(case["text"]).dtype == torch.long


@pytest.mark.parametrize("case", CASES)
def test_text_comes_back_as_the_originals(tokenizer, case):
    ids = case["ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids))
    assert tokenizer.decode(ids) == case["decode"] == case["sp_decode"]
    assert tokenizer.decode(case["ids_no_special"]) == case["decode"]
    assert tokenizer.decode(ids, skip_special=True) == case["decode_skip_special"]


@pytest.mark.parametrize("case", CASES)
def test_behind_a_newline_there_is_no_space_in_front(processor, case):
    """So the original encodes without it: a newline before, its two pieces taken off.

    SentencePiece alone finds no special tokens in the text.
    """
    ids = processor.encode(mark_whitespace("\n" + case["text"]))
    assert ids[2:] == case["sp_encode_no_dummy_prefix"]


@pytest.mark.parametrize(("text", "marked"), GOLDEN["preprocess"])
def test_marks_are_the_originals(text, marked):
    assert mark_whitespace(text) == marked
    assert clean_up(marked) == text


@pytest.mark.parametrize(("text", "marked"), GOLDEN["encode_whitespaces"])
def test_marks_of_spaces_and_tabs_alone(text, marked):
    lines = [mark_whitespace(line) for line in text.split("\n")]
    assert "\n".join(lines) == marked


@pytest.mark.parametrize("number", [*range(1, 83), 159, 160, 161, 162])
def test_a_run_of_spaces_is_the_longest_marks_first(number):
    left = number % 80
    runs = ["<|blank_80|>"] * (number // 80)
    runs += [] if left == 0 else [" "] if left == 1 else [f"<|blank_{left}|>"]
    assert mark_whitespace("a" + " " * number + "b") == f"a{''.join(runs)}b"
    assert clean_up(f"a{''.join(runs)}b") == "a" + " " * number + "b"


def test_a_mark_that_is_none_stays():
    for text in ("<|blank_1|>", "<|blank_81|>", "<|blank_02|>", "<|n|>"):
        assert clean_up(text) == text


@pytest.mark.parametrize("text", BESIDE_SPECIAL)
def test_whitespace_beside_a_special_token_is_lost(tokenizer, text):
    assert tokenizer.pieces(text) == BESIDE_SPECIAL[text]


@pytest.mark.parametrize("text", CLEANED)
def test_spaces_before_punctuation_are_lost(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == CLEANED[text]


@pytest.mark.parametrize(
    "spaced",
    [
        *(f" {end}" for end in (".", "?", "!", ",", ";", ":", "n't", "'d", "'ll")),
        *(f" {end}" for end in ("' ", "'m", "'s", "'ve", "'re", "' ' ", " . '  's")),
        " n ' t",
        " ' .",
        " ' m",
    ],
)
def test_clean_up_equals_that_of_transformers(spaced):
    for text in (f"a{spaced}b", f"{spaced} {spaced}", f"a {spaced}"):
        theirs = PreTrainedTokenizerBase.clean_up_tokenization(None, text)
        assert clean_up(text) == theirs


def test_the_special_tokens_are_the_originals(tokenizer):
    assert sorted(tokenizer.special) == GOLDEN["unique_no_split_tokens"]
    wanted = GOLDEN["properties"]
    assert tokenizer.sop_id == wanted["bos_token_id"]
    assert tokenizer.eos_id == wanted["eos_token_id"]
    assert tokenizer.mask_id == wanted["mask_token_id"]
    assert tokenizer.gmask_id == wanted["gmask_token_id"]
    assert tokenizer.pad_id == wanted["pad_token_id"]
    assert tokenizer.id_of(CONFIG["end_token"]) == wanted["end_token_id"]
    assert tokenizer.id_of(CONFIG["unk_token"]) == wanted["unk_token_id"]


def test_the_vocabulary_is_the_originals(tokenizer):
    assert tokenizer.vocab_size == GOLDEN["vocab_size"]
    assert {piece: tokenizer.id_of(piece) for piece in GOLDEN["ids"]} == GOLDEN["ids"]
    ids = [tokenizer.id_of(piece) for piece in GOLDEN["pieces"]]
    assert ids == list(range(tokenizer.vocab_size))


def test_a_question_with_its_answer(tokenizer):
    pair = GOLDEN["pair"]
    assert tokenizer.encode(pair["a"], pair["b"]).tolist() == [pair["ids"]]
    bare = tokenizer.encode(pair["a"], "").tolist()
    assert bare == [[*tokenizer.encode(pair["a"])[0].tolist(), tokenizer.eos_id]]


def test_padding_shows_nothing(tokenizer):
    padded = GOLDEN["decode_with_pads"]
    assert tokenizer.decode(padded["ids"]) == padded["text"]
    single, shown = GOLDEN["decode_edge"]["int"]
    assert tokenizer.decode([single]) == shown
    assert tokenizer.decode([]) == GOLDEN["decode_edge"]["empty"]


def test_padding_shows_nothing_whatever_its_piece(processor):
    tokenizer = ChatGLMTokenizer(processor, NAMES | {"pad_token": "好"})
    assert tokenizer.decode(tokenizer.encode_text("你好")) == "你"


def test_one_text_is_not_padded(tokenizer):
    found = tokenizer.encode(TEXTS[1]).tolist()
    assert found == GOLDEN["single_return_tensors"]["input_ids"]


def test_a_batch_is_padded_as_the_original_pads_it(tokenizer):
    wanted = GOLDEN["batch"]
    batch = tokenizer.pad([tokenizer.encode(text) for text in wanted["texts"]])
    assert batch.tokens.tolist() == wanted["input_ids"]
    assert batch.positions.tolist() == wanted["position_ids"]
    assert torch.equal(~batch.mask, torch.tensor(wanted["attention_mask"]).bool())


def test_a_padded_row_is_what_it_is_alone(tokenizer):
    texts = ["", "你好[MASK]的[MASK]", "是", "The dog on", "在 [MASK]"]
    answers = ["好", None, "我们\n去", "", "天气很好好好"]
    rows = [tokenizer.encode(*both) for both in zip(texts, answers, strict=True)]
    assert len({row.shape[1] for row in rows}) == len(rows)
    batch = tokenizer.pad(rows)
    for i, row in enumerate(rows):
        alone, num_tokens = tokenizer.pad([row]), row.shape[1]
        own = slice(batch.tokens.shape[1] - num_tokens, None)
        before = slice(0, own.start)
        assert torch.equal(alone.tokens, row)
        assert torch.equal(batch.tokens[i, own], row[0])
        assert torch.equal(batch.positions[i, :, own], alone.positions[0])
        assert torch.equal(batch.mask[i, 0, own, own], alone.mask[0, 0])
        assert (batch.tokens[i, before] == tokenizer.pad_id).all()
        assert not batch.positions[i, :, before].any()
        assert not batch.mask[i, :, before].any()
        assert not batch.mask[i, :, :, before].any()
        start = row[0].tolist().index(tokenizer.sop_id)
        wanted = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        wanted[:, :start] = True
        assert torch.equal(alone.mask[0, 0], wanted)


def test_the_answer_stands_at_the_first_short_mask(tokenizer):
    row = tokenizer.encode("你[MASK]的[MASK]", "好")
    places, steps = tokenizer.pad([row]).positions[0]
    start = row[0].tolist().index(tokenizer.sop_id)
    assert set(places[start:].tolist()) == {2}
    assert steps.tolist() == [0] * start + [1, 2, 3, 4]


@pytest.mark.parametrize("turn", GOLDEN["chat"])
def test_a_turn_of_the_chat(tokenizer, turn):
    *before, (query, response) = [tuple(both) for both in turn["history"]]
    assert query == turn["query"]
    assert chat_prompt(query, before) == turn["prompt"]
    messages = [
        {"role": role, "content": text}
        for both in before
        for role, text in zip(("user", "assistant"), both, strict=True)
    ]
    messages.append({"role": "user", "content": query})
    assert split_rounds(messages) == (query, before)
    wanted = tokenizer.encode(turn["prompt"])
    assert torch.equal(tokenizer.chat(messages), wanted)
    # The original's answer was given to it: what the chat made of its ids.
    answer = tokenizer.decode(tokenizer.encode_text(turn["raw_answer"]))
    assert clean_response(answer) == response == turn["response"]


@pytest.mark.parametrize(("answer", "shown"), GOLDEN["process_response"])
def test_an_answer_is_tidied_as_by_the_original(answer, shown):
    assert clean_response(answer) == shown


@pytest.mark.parametrize(("half", "full"), [*zip(",!:;?", "，！：；？", strict=True)])
def test_punctuation_changes_beside_chinese_alone(half, full):
    for text in (f"一{half}a", f"a{half}一", f"\u9fff{half}a", f"a{half}\u9fff"):
        assert clean_response(text) == text.replace(half, full)
    assert clean_response(f"中{half}{half}{half}中") == f"中{full}{half}{full}中"
    for text in (f"a{half}b", f"中 {half}", f"\u4dff{half}、{half}\ua000"):
        assert clean_response(text) == text


@pytest.mark.parametrize("num_image_tokens", [1, 7])
def test_ids_of_images_come_first(processor, tokenizer, num_image_tokens):
    shifted = ChatGLMTokenizer(processor, NAMES, num_image_tokens)
    assert shifted.vocab_size == GOLDEN["vocab_size"] + num_image_tokens
    for name in ("sop_id", "eos_id", "mask_id", "gmask_id", "pad_id"):
        assert getattr(shifted, name) == getattr(tokenizer, name) + num_image_tokens
    for case in GOLDEN["cases"]:
        ids = shifted.encode(case["text"])
        assert torch.equal(ids, tokenizer.encode(case["text"]) + num_image_tokens)
        assert shifted.decode(ids[0]) == case["decode"]
        found = shifted.decode(ids[0], skip_special=True)
        assert found == case["decode_skip_special"]
    batch = shifted.pad([shifted.encode(text) for text in GOLDEN["batch"]["texts"]])
    wanted = torch.tensor(GOLDEN["batch"]["input_ids"]) + num_image_tokens
    assert torch.equal(batch.tokens, wanted)
    last = num_image_tokens - 1
    assert shifted.decode([last, shifted.id_of("好")]) == f"<image_{last}>好"


def test_the_configuration_says_how_many_ids_are_images(folder):
    for given, expected in [({"num_image_tokens": 5}, 5), ({}, 20000)]:
        rest = {k: v for k, v in CONFIG.items() if k != "num_image_tokens"}
        edit = json.dumps(rest | given)
        (folder / "tokenizer_config.json").write_text(edit, "utf-8")
        assert load_tokenizer(folder).sop_id == GOLDEN["ids"]["<sop>"] + expected


@pytest.mark.parametrize("role", ROLES)
def test_names_are_read_from_the_configuration(folder, role):
    entry = CONFIG | {role: "<unused_0>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entry), "utf-8")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    ids = {
        "bos_token": tokenizer.sop_id,
        "eos_token": tokenizer.eos_id,
        "mask_token": tokenizer.mask_id,
        "gmask_token": tokenizer.gmask_id,
        "pad_token": tokenizer.pad_id,
    }
    new = GOLDEN["ids"]["<unused_0>"]
    assert [r for r, found in ids.items() if found == new] == (
        [role] if role in ids else []
    )
    whole = "<unused_0>" in tokenizer.pieces("a<unused_0>b")
    assert whole == (role != "gmask_token")


def stream(tokenizer, ids):
    """Check that each piece comes as early as it may; return what came."""
    shown = []

    def feed():
        for count, token in enumerate(ids):
            text = tokenizer.decode(ids[:count])
            assert text.endswith("\ufffd") or "".join(shown) == settled(text)
            yield token

    for piece in stream_text(tokenizer, feed()):
        shown.append(piece)
    return "".join(shown)


@pytest.mark.parametrize("text", [*TEXTS, *CLEANED])
def test_streamed_text_is_the_text(tokenizer, text):
    ids = tokenizer.encode(text, "好 . 是")[0].tolist()
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text",
    ["for 🦙 in 你好 :", "do n 't it 's a ' b ' n't", "x <|ta <n <n> 🦙 , a<|blank_2"],
)
def test_streamed_bytes_are_the_text(in_bytes, text):
    ids = in_bytes.encode_text(text)
    assert stream(in_bytes, ids) == in_bytes.decode(ids) == clean_up(text)
    assert "\ufffd" not in "".join(stream_text(in_bytes, ids))


def test_what_is_settled_stays():
    """Whatever comes after, and in whatever pieces."""
    draw = random.Random(0)
    atoms = [*" '' ntmsver.?!,a<>|", "  ", "<n>", "<|tab|>", "<|blank_3|>", "<|blank_"]
    changed = 0
    for _ in range(4000):
        text = "".join(draw.choices([*atoms, "n't", " '", " ' "], k=8))
        whole, shown = clean_up(text), ""
        for end in range(len(text) + 1):
            now = settled(clean_up(text[:end]))
            assert now.startswith(shown)
            assert whole.startswith(now)
            shown = now
        starts = [clean_up(text[:end]) for end in range(len(text))]
        changed += not all(map(whole.startswith, starts))
    assert changed > 2000  # without `settled`, these would lose text


@pytest.mark.parametrize("text", ["dog", "你好", "a.", "it's", "a > b", "<p class>"])
def test_a_usual_end_is_shown_at_once(text):
    assert settled(text) == text


@pytest.mark.parametrize("end", ["<|blank_80|", "<n", " ", " '", " n'", " 'v", "  ' "])
def test_an_end_that_may_change_is_held_back(end):
    assert settled(f"ab{end}") == "ab"
    assert settled(f"ab{end}\n") == f"ab{end}\n"


def test_nothing_is_held_back_where_nothing_is_cleaned_up(make_gguf):
    tokenizer = TextTokenizer(make_gguf().tokenizer, None, "<|im_end|>")
    assert tokenizer.settled("a ' <n") == "a ' <n"


def test_load_tokenizer_takes_what_is_there(folder, make_gguf):
    assert isinstance(load_tokenizer(folder), ChatGLMTokenizer)
    assert isinstance(load_tokenizer(str(folder)), ChatGLMTokenizer)
    make_gguf().tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps({"eos_token": "<|im_end|>"})
    (folder / "tokenizer_config.json").write_text(config, "utf-8")
    assert isinstance(load_tokenizer(folder), TextTokenizer)


def test_a_directory_without_a_tokenizer(tmp_path):
    message = re.escape(f"no tokenizer.json and no ice_text.model in {tmp_path}")
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["ice_text.model", "tokenizer_config.json"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    message = re.escape(f"no {name} in {folder}")
    with pytest.raises(FileNotFoundError, match=message):
        ChatGLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_model(folder, content):
    path = folder / "ice_text.model"
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ChatGLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({role: value}, f"{role} is {value!r}, not a string")
        for role, value in itertools.product(ROLES, (None, {"content": "<sop>"}))
    ]
    + [({role: "<no>"}, "has no piece '<no>'") for role in ROLES]
    + [({"num_image_tokens": n}, f"num_image_tokens is {n!r}") for n in (-1, "1", 1.5)]
    + [({name: True}, f"{name} is on") for name in ("do_lower_case", "remove_space")],
)
def test_a_configuration_that_does_not_fit(folder, entry, message):
    edit = json.dumps(CONFIG | entry)
    (folder / "tokenizer_config.json").write_text(edit, "utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        ChatGLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("outside", [-1, 214, 130528])
def test_an_id_outside_the_vocabulary(tokenizer, outside):
    with pytest.raises(ValueError, match=f"id {outside} is not in 0 to 213"):
        tokenizer.decode([93, outside])


def test_padding_needs_rows_that_are_prompts(tokenizer):
    with pytest.raises(ValueError, match="no rows to pad"):
        tokenizer.pad([])
    good = tokenizer.encode("好")
    no_sop = torch.tensor([[93, 105, tokenizer.gmask_id]])
    no_mask = torch.tensor([[93, 105, 111, 93, 105, tokenizer.sop_id]])
    with pytest.raises(ValueError, match=r"no <sop> \(id 8\) in row 1"):
        tokenizer.pad([good, no_sop])
    with pytest.raises(ValueError, match=r"no mask token \(id 4 or 5\) in row 2"):
        tokenizer.pad([good, good, no_mask])


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["assistant"],
        ["system", "user"],
        ["system"],
        ["user", "assistant"],
        ["user", "user"],
        ["user", "user", "user"],
        ["user", "assistant", "assistant"],
    ],
)
def test_a_conversation_out_of_turn(tokenizer, roles):
    messages = [{"role": role, "content": "好"} for role in roles]
    with pytest.raises(ValueError, match=re.escape(f"roles are {roles}, expected")):
        tokenizer.chat(messages)


def test_a_message_that_lacks_a_part(tokenizer):
    with pytest.raises(ValueError, match=r"roles are \[None\], expected"):
        tokenizer.chat([{"content": "好"}])
    messages = [{"role": role, "content": "好"} for role in ("user", "assistant")]
    with pytest.raises(ValueError, match="message 2 has no content"):
        tokenizer.chat([*messages, {"role": "user", "text": "好"}])
