"""The numbers behind the pictures of the KV cache."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from annotated_src.figures.cache import (
    SMOLLM2,
    call_flops,
    cost_data,
    draw_cost,
    draw_staircase,
    product_weights,
    staircase_data,
)
from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(31, 2, 12, 6, 2, 4, 20, 64, 1e-5, 10_000.0, tied)


@pytest.mark.parametrize("tied", [False, True])
def test_product_weights_are_the_matrices(tied):
    model = Llama(config(tied))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    embedding = 0 if tied else model.embedding.weight.numel()
    assert product_weights(model.config) == matrices - embedding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_cached"), [(1, 0), (7, 0), (1, 9), (3, 5)])
def test_call_flops_is_what_the_counter_counts(num_tokens, num_cached, tied):
    model = Llama(config(tied))
    cache = model.new_cache(1, num_cached + num_tokens)
    if num_cached:
        model(torch.zeros(1, num_cached, dtype=torch.int64), cache)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_tokens, dtype=torch.int64), cache)
    expected = call_flops(model.config, num_tokens, num_cached)
    assert counter.get_total_flops() == expected


def test_generate_costs_the_sum_of_its_calls():
    """But for the scores of the prompt's tokens before the last, which it spares."""
    model, c = Llama(config()), config()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(model, torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=6)
    decode = sum(call_flops(c, 1, cached) for cached in range(4, 9))
    spared = 3 * 2 * c.vocab_size * c.embed_dim
    assert counter.get_total_flops() == call_flops(c, 4) + decode - spared


def test_staircase_is_a_triangle_and_a_diagonal():
    data = staircase_data(Llama(config()), tuple("abcdefghi"), num_prompt=3)
    rows, columns = torch.arange(6)[:, None], torch.arange(9)
    assert torch.equal(data.without, (columns < 3 + rows).long())
    once = torch.where(rows == 0, columns < 3, columns == 2 + rows)
    assert torch.equal(data.with_cache, once.long())


def test_staircase_of_the_chapter():
    prompt, rest = "Once upon a time", "there was a llama who hums all day"
    words = [*prompt.split(), *rest.split()]
    data = staircase_data(Llama(config()), words, num_prompt=4)
    figure = draw_staircase(data)
    said = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"11 computed", "49 computed again", "49 read back"} <= said
    assert data.with_cache.sum() == 11
    assert data.without.sum() == 60


def test_staircase_leaves_no_hook_behind():
    model = Llama(config())
    staircase_data(model, tuple("abcd"), num_prompt=2)
    assert not model.get_submodule("blocks.0.attention.k_proj")._forward_hooks


def test_cost_adds_up_the_calls():
    data = cost_data(config())
    assert data.lengths.tolist() == list(range(1, 65))
    assert data.without[0] == data.with_cache[0] == call_flops(config(), 1)
    step = data.with_cache.diff()
    assert step.tolist() == [call_flops(config(), 1, s) for s in range(1, 64)]
    whole = data.without.diff()
    assert whole.tolist() == [call_flops(config(), s) for s in range(2, 65)]


def test_cost_of_the_real_sizes():
    data = cost_data(SMOLLM2)
    ratio = data.without / data.with_cache
    assert round(ratio[999].item()) == 519
    assert round((data.without[99] / data.without[49]).item()) == 4
    assert round((data.with_cache[99] / data.with_cache[49]).item()) == 2
    n = data.lengths.double()
    assert (ratio >= (n + 1) / 2 * (1 - 1e-12)).all()
    assert (ratio <= (2 * n + 1) / 3 * (1 + 1e-12)).all()
    assert product_weights(SMOLLM2) == 134_479_872


def test_cost_figure_says_the_ratio():
    data = cost_data(SMOLLM2)
    (ax,) = draw_cost(data).axes
    assert "519 times" in {text.get_text() for text in ax.texts}
    assert math.isclose(ax.get_xlim()[1], 8192)
