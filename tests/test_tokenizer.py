import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer

from annotated_src.gguf import read_gguf
from annotated_src.gguf_to_hf import convert_gguf, tokenizer_from_gguf
from annotated_src.tokenizer import TextBatch, TextTokenizer, render_chat, stream_text

TEXTS = [
    "The for statement is used to iterate, isn't it?",
    "  two spaces,\ttab\n\nlines  \n",
    "in 1984 and 3.14159",
    "你好，世界",
    "a 🦙 and 👩‍👩‍👧 e\u0301 é",
    "\ufffd is not half a character",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]
# How older files write a special token.
ADDED = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi! Wie geht's?"},
    {"role": "assistant", "content": "  Gut\n"},
    {"role": "user", "content": "<b>3 & 4</b>"},
]


@pytest.fixture(scope="module")
def folder(make_gguf, tmp_path_factory):
    target = tmp_path_factory.mktemp("tokenizer") / "small"
    convert_gguf(make_gguf().path, target, progress=lambda line: None)
    return target


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer.from_pretrained(folder)


@pytest.fixture
def metadata(make_gguf):
    return read_gguf(make_gguf().path).metadata


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_the_tokenizer_that_was_written(make_gguf, tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long
    assert ids.tolist() == [make_gguf().tokenizer.encode(text).ids]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(make_gguf, folder, tokenizer, text):
    """From the directory, and independently from the GGUF file."""
    path = make_gguf().path
    from_gguf = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for theirs in (AutoTokenizer.from_pretrained(folder), from_gguf):
        assert tokenizer.encode(text).tolist() == [theirs.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)[0]
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == plain


def test_special_tokens_are_one_id_each(tokenizer):
    found = tokenizer.encode("<|im_start|>for<|im_end|>")[0]
    assert found[[0, -1]].tolist() == [1, 2]
    assert tokenizer.eos_id == 2


def test_digits_stay_apart_though_a_merge_would_join_them(metadata):
    vocabulary = [*metadata["tokenizer.ggml.tokens"], "12", "Ġ1"]
    metadata["tokenizer.ggml.tokens"] = vocabulary
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    metadata["tokenizer.ggml.merges"] += ["1 2", "Ġ 1"]
    tokens = tokenizer_from_gguf(metadata).encode("a 12").tokens
    assert tokens == ["a", "Ġ", "1", "2"]


def test_a_user_defined_token_is_found_whole_and_shown(metadata):
    metadata["tokenizer.ggml.tokens"] += ["<think>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    rebuilt = tokenizer_from_gguf(metadata)
    ids = rebuilt.encode("a<think>b").ids
    assert ids[1] == rebuilt.token_to_id("<think>")
    assert rebuilt.decode(ids) == "a<think>b"


@pytest.mark.parametrize(
    ("key", "value"), [("model", "llama"), ("pre", "llama-bpe"), ("pre", "gpt-2")]
)
def test_another_kind_of_tokenizer(metadata, key, value):
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ValueError, match=f"'{value}'.* expected 'gpt2'"):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:1]])
def test_chat_equals_transformers(folder, tokenizer, messages):
    theirs = AutoTokenizer.from_pretrained(folder)
    given = {"add_generation_prompt": True}
    text = theirs.apply_chat_template(messages, tokenize=False, **given)
    ids = theirs.apply_chat_template(messages, return_dict=False, **given)
    assert render_chat(tokenizer.chat_template, messages) == text
    assert tokenizer.chat(messages).tolist() == [ids]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(tokenizer, text):
    ids = tokenizer.encode(text)[0].tolist()
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:  # no piece is half a character
        assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("text", ["for x in 你", "\ufffd for a 🦙 or two"])
def test_streaming_shows_each_character_at_once(tokenizer, text):
    ids = tokenizer.encode(text)[0].tolist()
    shown = []

    def feed():
        for count, token in enumerate(ids):
            assert "".join(shown) == tokenizer.decode(ids[:count]).rstrip("\ufffd")
            yield token

    for piece in stream_text(tokenizer, feed()):
        shown.append(piece)


def test_what_stays_half_a_character_comes_at_the_end(tokenizer):
    ids = tokenizer.encode("for 🦙")[0].tolist()[:-1]
    *before, last = stream_text(tokenizer, ids)
    assert "".join(before) == "for "
    assert set(last) == {"\ufffd"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in {copy}"):
        TextTokenizer.from_pretrained(copy)


def test_the_template_may_be_in_the_configuration(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"chat_template": "{{ 1 + 2 }}"}
    path.write_text(json.dumps(config), "utf-8")
    assert TextTokenizer.from_pretrained(copy).chat_template == "{{ 1 + 2 }}"


def test_an_end_token_that_is_not_in_the_vocabulary():
    with pytest.raises(ValueError, match="has no end token '</s>'"):
        TextTokenizer(Tokenizer(models.BPE()), "", "</s>")


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder, **entries):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


@pytest.mark.parametrize("eos", [None, {"content": 3}, 2])
def test_an_end_token_that_is_no_string_is_named(copied, eos):
    edit_config(copied, eos_token=eos)
    message = re.escape(f"eos_token is {eos!r}, not a string")
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_pretrained(copied)


def test_a_template_in_the_config_serves_where_no_file_is(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        TextTokenizer.from_pretrained(copied).chat(CHAT)
    template = "{{ messages[0].content }}"
    others = [
        {"name": "tools", "template": "x"},
        {"name": "default", "template": template},
    ]
    for entry in (template, others):
        edit_config(copied, chat_template=entry)
        tokenizer = TextTokenizer.from_pretrained(copied)
        theirs = AutoTokenizer.from_pretrained(copied)
        assert theirs.apply_chat_template(CHAT, tokenize=False) == "Be brief."
        assert torch.equal(tokenizer.chat(CHAT), tokenizer.encode("Be brief."))


@pytest.mark.parametrize("entry", [3, [], [{"name": "tools", "template": "x"}], ["x"]])
def test_a_template_that_is_no_string_is_named(copied, entry):
    (copied / "chat_template.jinja").unlink()
    edit_config(copied, chat_template=entry)
    with pytest.raises(ValueError, match=re.escape(f"chat_template is {entry!r}")):
        TextTokenizer.from_pretrained(copied)


def test_special_tokens_by_their_role(copied):
    given = ADDED | {"content": "<|endoftext|>"}
    edit_config(copied, eos_token=given, bos_token="<|im_start|>", pad_token=given)
    tokenizer = TextTokenizer.from_pretrained(copied)
    theirs = AutoTokenizer.from_pretrained(copied)
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (1, 0, 0)
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert tokenizer.vocab_size == len(theirs) == 319
    edit_config(copied, bos_token=None, pad_token=None)
    tokenizer = TextTokenizer.from_pretrained(copied)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("role", "word"), [("bos", "begin"), ("eos", "end"), ("pad", "pad")]
)
def test_a_special_token_that_is_not_in_the_vocabulary(copied, role, word):
    edit_config(copied, **{f"{role}_token": "<none>"})
    with pytest.raises(ValueError, match=f"has no {word} token '<none>'"):
        TextTokenizer.from_pretrained(copied)


def test_the_vocabulary_counts_up_to_its_largest_id(copied):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["zzz"] = 400  # nothing has 319 to 399
    path.write_text(json.dumps(content), "utf-8")
    assert TextTokenizer.from_pretrained(copied).vocab_size == 401


def with_bos(folder):
    """Let tokenizer.json put a token in front, as that of a base model does."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(path))


@pytest.mark.parametrize("text", TEXTS)
def test_what_stands_in_front_of_every_text(copied, text):
    with_bos(copied)
    tokenizer = TextTokenizer.from_pretrained(copied)
    theirs = AutoTokenizer.from_pretrained(copied)
    plain = tokenizer.encode(text)[0].tolist()
    assert plain == theirs(text, add_special_tokens=False).input_ids
    found = tokenizer.encode(text, add_special_tokens=True)
    assert found.tolist() == [theirs(text).input_ids] == [[1, *plain]]


def test_a_conversation_gets_no_second_start(copied):
    with_bos(copied)
    tokenizer = TextTokenizer.from_pretrained(copied)
    theirs = AutoTokenizer.from_pretrained(copied)
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = theirs.apply_chat_template(CHAT, **options)
    assert tokenizer.chat(CHAT).tolist() == [ids]


def test_the_template_may_call_special_tokens(copied):
    (copied / "chat_template.jinja").write_text(
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
        "|{{ unk_token }}|{{ sep_token }}"
    )
    edit_config(
        copied, unk_token="<|endoftext|>", bos_token=ADDED | {"content": "<|im_start|>"}
    )
    tokenizer = TextTokenizer.from_pretrained(copied)
    theirs = AutoTokenizer.from_pretrained(copied)
    text = theirs.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|im_start|>|<|im_end|>|<|im_end|>|<|endoftext|>|"
    assert torch.equal(tokenizer.chat(CHAT), tokenizer.encode(text))


def test_a_file_may_not_cut_or_fill_up(copied):
    """What training left behind there, transformers switches off, too."""
    path = copied / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    ours, theirs = (k.from_pretrained(copied) for k in (TextTokenizer, AutoTokenizer))
    for text in ("a", "one two three four"):
        assert ours.encode(text).tolist() == [theirs(text).input_ids]
    assert ours.encode("a").shape == (1, 1)


@pytest.mark.parametrize("as_rows", [True, False])
def test_padding_equals_transformers(folder, tokenizer, as_rows):
    theirs = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = ["a", "one two three", "for x in 你"]
    rows = [tokenizer.encode(text) for text in texts]
    batch = tokenizer.pad(rows if as_rows else [row[0] for row in rows])
    expected = theirs(texts, padding=True, return_tensors="pt")
    assert isinstance(batch, TextBatch)
    assert torch.equal(batch.tokens, expected.input_ids)
    assert torch.equal(batch.is_token, expected.attention_mask.bool())
    assert batch.is_token[:, -1].all()
    assert not batch.is_token[0, :-1].any()


def test_a_text_may_hold_the_padding_id(tokenizer):
    """What is padding is told by place, not by id."""
    row = torch.tensor([[tokenizer.pad_id, 5, tokenizer.pad_id]])
    batch = tokenizer.pad([row, row[:, :1]])
    assert batch.is_token.tolist() == [[True] * 3, [False, False, True]]
    assert torch.equal(batch.tokens[:1], row)


def test_no_rows_or_an_empty_one(tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        tokenizer.pad([])
    row = torch.tensor([[5]])
    for empty in (row[:, :0], row[0, :0]):
        with pytest.raises(ValueError, match=r"row 1 is \(.*0\)|row 1 is \(0,\)"):
            tokenizer.pad([row, empty])


@pytest.mark.usefixtures("unchecked")
def test_a_row_that_is_several(tokenizer):
    with pytest.raises(ValueError, match=r"row 0 is \(2, 3\), not \(T\) or \(1, T\)"):
        tokenizer.pad([torch.ones(2, 3, dtype=torch.long)])


def sentencepiece_style(decoder):
    """Spaces are ▁, the first of them comes and goes; rare characters are bytes."""
    words = ["▁", "▁the", "▁a", "the", "a", "x", "▁▁", "\ufffd", "你", "b</w>", "c</w>"]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return TextTokenizer(tokenizer, None, "<s>")


LLAMA_2 = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
GEMMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
)
KINDS = {
    "llama": LLAMA_2,
    "gemma": GEMMA,
    "metaspace": decoders.Metaspace(),
    "words": decoders.BPEDecoder("</w>"),
}


@pytest.mark.parametrize("kind", KINDS)
@example(ids=[2, 0], often=[255])  # a special token inside a run of bytes
@given(ids=st.lists(st.integers(0, 268)), often=st.lists(st.integers(255, 268)))
def test_any_ids_stream_whatever_the_decoder(kind, ids, often):
    tokenizer = sentencepiece_style(KINDS[kind])
    for row in (ids, often, ids + often, [1, *often]):
        assert "".join(stream_text(tokenizer, iter(row))) == tokenizer.decode(row)


@given(ids=st.lists(st.integers(0, 318)))
def test_any_ids_of_bytes_stream(tokenizer, ids):
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.decode(ids)


def test_spaces_stay_between_words_and_go_in_front():
    tokenizer = sentencepiece_style(LLAMA_2)
    ids = [tokenizer.tokenizer.token_to_id(t) for t in ("<s>", "▁the", "▁", "▁a", "x")]
    assert [p for p in stream_text(tokenizer, ids) if p] == ["the", " ", " a", "x"]


def test_a_run_of_bytes_waits_for_its_end():
    """A broken run shows no character of its own, so none may be shown before."""
    tokenizer = sentencepiece_style(LLAMA_2)
    space = tokenizer.tokenizer.token_to_id("▁a")
    lama = [byte + 2 for byte in "🦙".encode()]
    assert [p for p in stream_text(tokenizer, [*lama, space]) if p] == ["🦙 a"]
    broken = [*lama, lama[0], space]
    assert "".join(stream_text(tokenizer, broken)) == tokenizer.decode(broken)
    assert tokenizer.decode(broken) == "\ufffd" * 5 + " a"


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_the_work_of_streaming_grows_with_the_text(tokenizer, kind, monkeypatch):
    tokenizer = tokenizer if kind == "bytes" else sentencepiece_style(KINDS[kind])
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids)
    )
    ids = [258 + i % 11 for i in range(400)]
    assert "".join(stream_text(tokenizer, ids)) == decode(ids)
    assert sum(decoded) < 10 * len(ids)


def test_half_a_surrogate_pair(tokenizer):
    """As a shell hands over an argument that is no UTF-8."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a" + b"\xff".decode("utf-8", "surrogateescape"))
