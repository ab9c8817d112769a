"""The trained model that is part of the package."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from annotated_src.blank_infilling import mask_rest, mask_span, pad_right
from annotated_src.checkpoint import load_model
from annotated_src.generate import generate
from annotated_src.loss import next_token_loss
from annotated_src.small_chatglm import SMALL_CHATGLM, held_out
from annotated_src.tokenizer import load_tokenizer
from annotated_src.train_small_chatglm import describe
from annotated_src.training_text import passages

META = Path(__file__).parent / "golden" / "chatglm6b" / "meta.json"


@pytest.fixture(scope="module")
def model():
    return load_model(SMALL_CHATGLM)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMALL_CHATGLM)


def test_its_config_has_all_of_the_original_s_keys(tokenizer):
    config = json.loads((SMALL_CHATGLM / "config.json").read_text("utf-8"))
    original = json.loads(META.read_text("utf-8"))["config"]
    assert set(original) <= set(config)
    assert config == describe(tokenizer)


def test_its_files_are_small_and_hold_the_original_s_names():
    assert sum(path.stat().st_size for path in SMALL_CHATGLM.iterdir()) < 4e6
    with safe_open(SMALL_CHATGLM / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        kinds = {stored.get_tensor(name).dtype for name in names}
    assert kinds == {torch.half}
    assert len(names) == 1 + 4 * 12 + 2
    assert all(name.startswith("transformer.") for name in names)


def test_the_held_out_chapters_are_verses_without_marks():
    chapters = held_out()
    assert len(chapters) == 24
    assert chapters[0][0].startswith("And there was a famine in the land")
    for verse in (verse for chapter in chapters for verse in chapter):
        assert verse == verse.strip() != ""
        assert not set("#[]") & set(verse)


def test_the_tokenizer_reads_every_held_out_verse_back(tokenizer):
    for verse in (verse for chapter in held_out() for verse in chapter):
        ids = tokenizer.encode_text(verse)
        assert 0 not in ids  # <unk>
        assert tokenizer.decode(ids) == verse


@torch.no_grad()
def test_it_has_learnt_both_kinds_of_blanks(model, tokenizer):
    draw, ids, eop = random.Random(0), model.config.blank_ids, tokenizer.eos_id
    texts = [text for c in held_out()[:12] for text in passages(c, draw)]
    rows = [tokenizer.encode_text(text)[:128] for text in texts[:60]]
    shorts = [mask_span(row, 3, 6, ids, eop) for row in rows]
    longs = [mask_rest(row, len(row) // 2, ids, eop) for row in rows]
    for examples, bound in ((shorts, 3.2), (longs, 4.0)):
        tokens, labels = pad_right(examples, tokenizer.pad_id)
        labels[labels == ids.sop] = -100
        assert next_token_loss(model(tokens), labels) < bound


def test_it_knows_to_whom_the_lord_spake(model, tokenizer):
    before = tokenizer.encode_text("And the LORD spake unto")
    after = tokenizer.encode_text("saying, Speak unto the children of Israel.")
    ids = model.config.blank_ids
    prompt = torch.tensor([[*before, ids.mask, *after, ids.sop]])
    stop = [tokenizer.eos_id]
    filled = generate(model, prompt, max_new_tokens=8, stop_ids=stop)
    answer = filled[0, prompt.shape[1] :]
    assert tokenizer.decode(answer).startswith("Moses")
    assert answer[-1] == tokenizer.eos_id
