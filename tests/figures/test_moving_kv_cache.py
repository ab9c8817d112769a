"""What the steps of a figure that moves cost, against arithmetic with its sizes."""

import re
from pathlib import Path

import pytest

from annotated_src.figures.moving.kv_cache import SIZES, kv_cache_data

CHAPTER = Path(__file__).resolve().parents[2] / "notebooks/llama/07_cache.py"


@pytest.fixture(scope="module")
def data():
    return kv_cache_data()


def operations(rows, held):
    """A multiply-add is two: matrices for each row, two products with each key."""
    c = SIZES
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    block = c.embed_dim * (heads + 3 * c.ffn_dim)
    attention = 2 * c.num_heads * c.head_dim * (held + rows)
    scores = c.vocab_size * c.embed_dim  # of the last row alone
    return 2 * (rows * c.num_layers * (block + attention) + scores)


def test_with_a_cache_each_token_passes_once(data):
    steps = data["with_cache"]
    assert steps["computed"] == [4, 1, 1, 1, 1, 1, 1, 1]
    assert steps["read"] == [0, 4, 5, 6, 7, 8, 9, 10]
    expected = [operations(4, 0), *(operations(1, held) for held in range(4, 11))]
    assert steps["operations"] == expected


def test_without_one_the_whole_text_does(data):
    steps = data["without"]
    assert steps["computed"] == list(range(4, 12))
    assert steps["read"] == [0] * 8
    assert steps["operations"] == [operations(rows, 0) for rows in range(4, 12)]


def test_words_and_bytes(data):
    assert len(data["words"]) == data["prompt"] + len(data["without"]["computed"])
    # Two tensors, three layers, two KV heads of width 8, float64.
    assert data["token_bytes"] == 2 * 3 * 2 * 8 * 8
    assert data["layers"] == 3


def test_what_the_chapter_says_is_what_one_sees(data):
    text = CHAPTER.read_text("utf-8").replace("\n# ", " ")
    said = re.search(r":class: moving kv-cache (.*?) :::", text)[1]
    without, cached = data["without"], data["with_cache"]
    million = [sum(steps["operations"]) / 1e6 for steps in (without, cached)]
    first, second, *_, before, last = without["computed"]
    assert len(data["words"]) == 12
    for words in (
        f"{first} tokens, then {second}, and {last} in step {len(without['computed'])}",
        f"of which {before} have passed before",
        f"{sum(without['computed'])} in all",
        f"the prefill sends {cached['computed'][0]} and every later step 1",
        f"which makes {sum(cached['computed'])}",
        f"values of {cached['read'][-1]} are read back",
        f"{million[0]:.2f} million operations against {million[1]:.2f}",
    ):
        assert words in said
    assert without["operations"][0] == cached["operations"][0]  # "is the same for both"
