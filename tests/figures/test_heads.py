import pytest
import torch

from annotated_src.attention import attend
from annotated_src.figures import heads
from annotated_src.kv_cache import LayerCache
from annotated_src.masks import causal_mask


@pytest.fixture(scope="module")
def sharing():
    return heads.sharing_data()


def test_wires_go_to_neighbours(sharing):
    wiring = {name: reads.tolist() for name, reads in sharing.wiring.items()}
    assert wiring == {
        "Multi-head": [0, 1, 2, 3, 4, 5],
        "Grouped-query": [0, 0, 0, 1, 1, 1],
        "Multi-query": [0, 0, 0, 0, 0, 0],
    }


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("Llama-2-7B", 2048),
        ("Llama-2-70B", 1280),
        ("Llama-3-8B", 512),
        ("TinyLlama-1.1B", 88),
        ("SmolLM2-135M", 90),
        ("ChatGLM-6B", 1792),
        ("ChatGLM2-6B", 112),
    ],
)
def test_caches_weigh_what_the_alt_text_says(sharing, name, mib):
    assert sharing.cache[name] == mib * 2**20


def test_unshared_is_what_a_cache_for_all_query_heads_takes(sharing):
    c = heads.MODELS["Llama-2-70B"]
    layer = LayerCache(
        1, c.num_heads, 4096, c.head_dim, torch.float16, torch.device("meta")
    )
    assert sharing.unshared["Llama-2-70B"] == c.num_layers * layer.num_bytes
    assert sharing.unshared["Llama-2-70B"] == 10 * 2**30


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-2-70B", 68_976_648_192),
        ("Llama-3-8B", 8_030_261_248),
        ("TinyLlama-1.1B", 1_100_048_384),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_sizes_give_the_published_number_of_weights(name, published):
    model = heads.weightless(heads.MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == published
    assert next(model.parameters()).dtype == torch.float16


def tensors(num_heads, num_kv_heads, length=50, head_dim=32, batch=2):
    queries = torch.randn(batch, num_heads, 1, head_dim)
    keys, values = torch.randn(2, batch, num_kv_heads, length, head_dim)
    return queries, keys, values, causal_mask(1, length - 1)


def test_multi_head_attention_reads_the_cache_and_copies_nothing():
    inputs = tensors(4, 4)
    moves = heads.count_moves(attend, *inputs)
    assert moves == (inputs[1].nbytes + inputs[2].nbytes, 0, 0)


def test_repeating_reads_once_and_writes_and_reads_every_copy():
    inputs = tensors(6, 2)
    moves = heads.count_moves(attend, *inputs)
    cache = inputs[1].nbytes + inputs[2].nbytes
    assert moves == (cache, 3 * cache, 3 * cache)


def test_a_copy_made_in_two_steps_counts_twice():
    def wasteful(queries, keys, values, mask):
        return attend(queries, keys.clone(), values, mask)

    inputs = tensors(4, 4)
    moves = heads.count_moves(wasteful, *inputs)
    size = inputs[1].nbytes
    assert moves == (2 * size, size, size)


def test_counts_are_the_same_with_and_without_numbers():
    inputs = tensors(6, 2)
    ghosts = [x.to("meta") for x in inputs]
    assert heads.count_moves(attend, *inputs) == heads.count_moves(attend, *ghosts)


def test_traffic_is_what_the_alt_text_says():
    data = heads.traffic_data({"unshared": (32, attend), "repeated": (8, attend)})
    mib = {name: [n / 2**20 for n in moves] for name, moves in data.moves.items()}
    assert mib == {"unshared": [64, 0, 0], "repeated": [16, 64, 64]}


def test_figures_draw(sharing):
    data = heads.traffic_data({"unshared": (32, attend), "repeated": (8, attend)})
    for figure in (heads.draw_sharing(sharing), heads.draw_traffic(data)):
        assert figure._repr_png_()[:4] == b"\x89PNG"
