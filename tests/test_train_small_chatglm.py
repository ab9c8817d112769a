import json
import sys

import pytest
import torch
from safetensors import safe_open

from annotated_src import train_small_chatglm
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import load_model
from annotated_src.generate import generate
from annotated_src.loss import IGNORE
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.small_chatglm import SMALL_CHATGLM, held_out
from annotated_src.train_small_chatglm import (
    batches,
    describe,
    endless,
    init_weights,
    save,
    train,
)

CHAPTERS = held_out()[:3]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(SMALL_CHATGLM)


@pytest.fixture
def config(tokenizer):
    return {**describe(tokenizer, embed_dim=32), "num_layers": 2}


@pytest.fixture
def model(config):
    model = ChatGLM(ChatGLMConfig.from_hf(config))
    init_weights(model, torch.Generator().manual_seed(0))
    return model


def test_first_weights_keep_the_scale_of_what_they_are_given():
    layer = torch.nn.Linear(400, 300)
    init_weights(layer, torch.Generator().manual_seed(0))
    assert 0.97 < layer(torch.randn(500, 400)).std() < 1.03


def test_at_first_all_tokens_are_about_equally_likely(model, tokenizer):
    tokens, _ = next(batches(CHAPTERS[0], model, tokenizer, seed=0))
    shares = model(tokens).softmax(-1)
    assert shares.max() < 5 / tokenizer.vocab_size


def test_every_text_is_in_an_epoch_once(model, tokenizer):
    texts = [verse for chapter in CHAPTERS for verse in chapter]
    found = []
    for tokens, labels in batches(texts, model, tokenizer, seed=3):
        assert tokens.shape == labels.shape
        for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
            sop, eop = row.index(tokenizer.sop_id), row.index(tokenizer.eos_id)
            assert set(asked[:sop]) == {IGNORE} == {*asked[eop + 1 :], IGNORE}
            context, answer = row[:sop], row[sop + 1 : eop]
            masks = (tokenizer.mask_id, tokenizer.gmask_id)
            (blank,) = [i for i, t in enumerate(context) if t in masks]
            found.append([*context[:blank], *answer, *context[blank + 1 :]])
    assert sorted(found) == sorted(tokenizer.encode_text(text) for text in texts)


def test_epochs_differ_and_repeat_with_their_number(model, tokenizer):
    def first(epochs):
        return [next(epochs)[0].tolist() for _ in range(12)]

    once = first(endless(CHAPTERS[:1], model, tokenizer))
    assert once == first(endless(CHAPTERS[:1], model, tokenizer))
    assert len({str(tokens) for tokens in once}) == 12


def test_the_loss_falls_and_the_saved_folder_answers(
    tmp_path, model, config, tokenizer
):
    before = {name: w.clone() for name, w in model.state_dict().items()}
    losses = list(train(model, tokenizer, CHAPTERS, 40))
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.8
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, before[name]), name
    save(model, config, tmp_path)
    loaded = load_model(tmp_path)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].half().float())
    prompt = tokenizer.encode("And it came to pass")
    ids = generate(loaded, prompt, max_new_tokens=5)
    assert ids.shape == (1, prompt.shape[1] + 5)


def test_the_folder_has_the_names_and_keys_of_the_original(tmp_path, model, config):
    save(model, config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
        assert stored.get_tensor("transformer.final_layernorm.bias").dtype == torch.half
    assert "transformer.word_embeddings.weight" in names
    assert "transformer.layers.1.attention.query_key_value.bias" in names
    assert len(names) == 1 + 2 * 12 + 2
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written == config


def test_the_command_writes_all_that_the_book_s_folder_has(tmp_path, monkeypatch):
    verses = {
        f"Book {i}:{j}": verse
        for i, chapter in enumerate(held_out())
        for j, verse in enumerate(chapter)
    }
    for i in range(24, 30):  # so that chapter 25 is held out
        verses |= {f"Book {i}:{j}": f"verse {i} and {j}" for j in range(3)}
    (tmp_path / "verses.json").write_text(json.dumps(verses), encoding="utf-8")
    files = [str(tmp_path / "verses.json"), str(tmp_path / "out")]
    sizes = ["--steps", "1", "--vocab-size", "500"]
    monkeypatch.setattr(sys, "argv", ["train", *files, *sizes])
    train_small_chatglm.main()
    made = {path.name for path in (tmp_path / "out").iterdir()}
    shipped = {path.name for path in SMALL_CHATGLM.iterdir()}
    assert made == shipped - {"README.md"}
    assert (tmp_path / "out" / "held_out.txt").read_text() == (
        "verse 25 and 0\nverse 25 and 1\nverse 25 and 2\n"
    )
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "out").vocab_size == 500
