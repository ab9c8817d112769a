"""The wiring and the sizes of a figure that moves, against plain arithmetic."""

import re
from pathlib import Path

import pytest

from annotated_src.figures.moving.gqa_groups import gqa_groups_data

CHAPTER = Path(__file__).resolve().parents[2] / "notebooks/llama/06_heads.py"
# Layers, query heads, KV heads as built, width of a head: from the models' papers.
PUBLISHED = {
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-3-8B": (32, 32, 8, 128),
    "TinyLlama-1.1B": (22, 32, 4, 64),
    "Llama-2-70B": (80, 64, 8, 128),
}


@pytest.fixture(scope="module")
def data():
    return gqa_groups_data()


def test_neighbours_share_and_the_mistake_deals_them_out(data):
    assert data["kv_heads"] == [8, 4, 2, 1]
    for i, kv_heads in enumerate(data["kv_heads"]):
        group = 8 // kv_heads
        assert data["reads"][i] == [n // group for n in range(8)]
        assert data["tiled"][i] == [n % kv_heads for n in range(8)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_two_numbers_a_feature_of_every_kv_head_and_layer(data, name):
    layers, heads, built, width = PUBLISHED[name]
    model = data["models"][name]
    assert (model["heads"], model["built"]) == (heads, built)
    assert model["kv_heads"] == [heads, heads // 2, heads // 4, heads // 8]
    for i, kv_heads in enumerate(model["kv_heads"]):
        numbers = 2 * layers * kv_heads * width  # keys and values
        assert model["token_bytes"][i] == 2 * numbers  # float16
        assert model["text_bytes"][i] == 4096 * 2 * numbers
    assert built in model["kv_heads"]  # the figure can mark it


def test_what_the_chapter_says_is_what_one_sees(data):
    text = CHAPTER.read_text("utf-8").replace("\n# ", " ")
    said = re.search(r":class: moving gqa-groups (.*?) :::", text)[1]
    llama = data["models"]["Llama-3-8B"]
    kib = [size // 1024 for size in llama["token_bytes"]]
    built = llama["kv_heads"].index(llama["built"])
    pairs = zip(data["reads"][1], data["tiled"][1], strict=True)
    right = [n for n, (read, tiled) in enumerate(pairs) if read == tiled]
    assert data["reads"][2] == [0, 0, 0, 0, 1, 1, 1, 1]
    for words in (
        "heads 0 to 3 read KV head 0 and 4 to 7 read KV head 1",
        f"{kib[0]} KiB a token with {llama['kv_heads'][0]} of them",
        f"{kib[built]} KiB with its {llama['built']}",
        f"4 KV heads, only query heads {right[0]} and {right[1]} still",
    ):
        assert words in said
    assert len(right) == 2
    assert data["kv_heads"][1] == 4
