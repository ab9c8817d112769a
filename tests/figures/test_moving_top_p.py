"""What top-p keeps in a figure that moves: the saved table, and the real model."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from annotated_src.checkpoint import load_model
from annotated_src.figures.moving.top_p import SAVED, top_p_data
from annotated_src.figures.moving.top_p_table import measure
from annotated_src.tokenizer import TextTokenizer

CHAPTER = Path(__file__).resolve().parents[2] / "notebooks/text/05_sampling.py"


@pytest.fixture(scope="module")
def data():
    return top_p_data()


@pytest.fixture(scope="module")
def tables(data):
    return [table for prompt in data["prompts"] for table in prompt["temperatures"]]


def test_it_is_small_and_complete(data, tables):
    assert len(SAVED.read_bytes()) < 40_000
    assert data["cuts"] == [round(0.05 * n, 2) for n in range(1, 21)]
    assert len(tables) == 2 * len(data["temperatures"])
    for prompt in data["prompts"]:
        assert len(set(prompt["words"])) == 8
    for table in tables:
        assert len(table["shares"]) == 8
        assert len(table["kept"]) == len(table["mass"]) == len(data["cuts"])


def test_what_stays_reaches_p_and_not_without_its_last(data, tables):
    for table in tables:
        reached = torch.tensor(table["shares"]).cumsum(0).tolist()
        for p, kept, mass in zip(
            data["cuts"], table["kept"], table["mass"], strict=True
        ):
            assert mass >= p - 1e-4
            if kept <= len(reached):
                assert mass == pytest.approx(reached[kept - 1], abs=1e-4)
                assert kept == 1 or reached[kept - 2] < p + 1e-4
        assert table["kept"] == sorted(table["kept"])
        assert (table["kept"][-1], table["mass"][-1]) == (data["vocab_size"], 1)


def test_warmth_takes_from_the_best_and_lets_more_stay(data):
    for prompt in data["prompts"]:
        for cold, warm in pairwise(prompt["temperatures"]):
            assert cold["shares"][0] > warm["shares"][0]
            both = zip(cold["kept"], warm["kept"], strict=True)
            assert all(few <= many for few, many in both)


def test_the_real_model_says_the_same(data, smollm2_dir):
    found = measure(smollm2_dir)
    for name in ("vocab_size", "temperatures", "cuts"):
        assert found[name] == data[name]
    for saved, now in zip(data["prompts"], found["prompts"], strict=True):
        assert (saved["text"], saved["words"]) == (now["text"], now["words"])
        for old, new in zip(saved["temperatures"], now["temperatures"], strict=True):
            assert new["shares"] == pytest.approx(old["shares"], abs=2e-4)
            assert new["mass"] == pytest.approx(old["mass"], abs=2e-4)
            assert new["kept"] == pytest.approx(old["kept"], rel=2e-3, abs=1)


@torch.no_grad()
def test_the_table_is_what_counting_along_the_sorted_shares_gives(data, smollm2_dir):
    model = load_model(smollm2_dir)
    tokenizer = TextTokenizer.from_pretrained(smollm2_dir)
    for prompt in data["prompts"]:
        logits = model(tokenizer.encode(prompt["text"]))[0, -1].double()
        for t, table in zip(data["temperatures"], prompt["temperatures"], strict=True):
            sums = (logits / t).softmax(0).sort(descending=True).values.cumsum(0)
            counted = [int((sums < p).sum()) + 1 for p in data["cuts"][:-1]]
            assert table["kept"][:-1] == pytest.approx(counted, rel=2e-3, abs=1)


def test_what_the_chapter_says_is_what_one_sees(data):
    text = CHAPTER.read_text("utf-8").replace("\n# ", " ")
    said = re.search(r":class: moving top-p (.*?) :::", text)[1]
    cool, warm = (data["temperatures"].index(t) for t in (1.0, 2.0))
    cut = data["cuts"].index(0.8)
    kept = [
        [prompt["temperatures"][t]["kept"][cut] for t in (cool, warm)]
        for prompt in data["prompts"]
    ]
    japan, llama = (prompt["text"] for prompt in data["prompts"])
    best = data["prompts"][0]["temperatures"][cool]["shares"][0]
    for words in (
        f"{data['vocab_size']:,} tokens lie end to end",
        f"*{japan}*, $p = 0.8$ keeps {kept[0][0]} tokens at temperature 1, "
        f"and {kept[0][1]:,} at temperature 2",
        f"*{llama}* it keeps {kept[1][0]}, and {kept[1][1]:,}",
        f"*{data['prompts'][0]['words'][0]}*, with {best:.1%}".replace("%", " %"),
    ):
        assert words in said
    lower = data["cuts"].index(0.7)
    assert data["prompts"][0]["temperatures"][cool]["kept"][lower] == 1
    assert "to 0.70 at temperature 1" in said
