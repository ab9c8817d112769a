import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from annotated_src.gguf import read_gguf
from annotated_src.gguf_to_hf import convert_gguf, tokenizer_from_gguf
from annotated_src.tokenizer import TextTokenizer, render_chat, stream_text

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


def test_blocks_of_a_template_leave_no_lines():
    template = (
        "{% for message in messages %}\n"
        "  {% if true %}\n"
        "{{ message['content'] }};\n"
        "  {% endif %}\n"
        "{% endfor %}"
    )
    assert render_chat(template, CHAT[:2]) == "Be brief.;\nHi! Wie geht's?;\n"


@pytest.mark.parametrize(
    "template",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ unknown }}"],
)
def test_templates_are_strangers(template):
    with pytest.raises(Exception, match=r"not safely callable|unsafe|undefined"):
        render_chat(template, CHAT[:1].copy())


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


@pytest.mark.parametrize("eos", [None, {"content": "<|im_end|>"}, 2])
def test_an_end_token_that_is_no_string_is_named(copied, eos):
    edit_config(copied, eos_token=eos)
    message = re.escape(f"eos_token is {eos!r}, not a string")
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_pretrained(copied)


def test_a_template_in_the_config_serves_where_no_file_is(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        TextTokenizer.from_pretrained(copied).chat(CHAT)
    edit_config(copied, chat_template="{{ messages[0].content }}")
    tokenizer = TextTokenizer.from_pretrained(copied)
    assert torch.equal(tokenizer.chat(CHAT), tokenizer.encode("Be brief."))


@pytest.mark.parametrize(
    "template", ["{{ nobody }}", "{% if %}", "{{ ''.__class__.x }}"]
)
def test_a_template_that_fails_says_so(template):
    with pytest.raises(ValueError, match="chat template: "):
        render_chat(template, CHAT)
