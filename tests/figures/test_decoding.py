"""The numbers behind the pictures of prefill and decode."""

from unittest.mock import patch

import pytest
import torch

from annotated_src.attention import attend, attend_fused
from annotated_src.figures.cache import SMOLLM2
from annotated_src.figures.cache import call_flops as all_logits_flops
from annotated_src.figures.decoding import (
    BytesRead,
    answer_data,
    call_bytes,
    call_flops,
    counted_flops,
    draw_answer,
    draw_intensity,
    draw_token_cost,
    intensity_data,
    token_cost_data,
)
from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig

CALLS = [(1, 0, 1), (7, 0, 2), (1, 9, 3), (3, 5, 1)]


def config(num_kv_heads=2, tied=False):
    return LlamaConfig(31, 2, 12, 6, num_kv_heads, 4, 20, 64, 1e-5, 10_000.0, tied)


def filled(model, batch_size, num_cached, num_tokens):
    cache = model.new_cache(batch_size, num_cached + num_tokens)
    if num_cached:
        model(torch.zeros(batch_size, num_cached, dtype=torch.long), cache)
    return cache, torch.zeros(batch_size, num_tokens, dtype=torch.long)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_cached", "batch_size"), CALLS)
@pytest.mark.parametrize("last_only", [False, True])
def test_call_flops_is_what_the_counter_counts(
    num_tokens, num_cached, batch_size, last_only, tied
):
    model = Llama(config(tied=tied))
    cache, tokens = filled(model, batch_size, num_cached, num_tokens)
    found = counted_flops(lambda: model(tokens, cache, last_logits_only=last_only))
    logits = 1 if last_only else num_tokens
    expected = call_flops(model.config, num_tokens, num_cached, batch_size, logits)
    assert found == expected


def test_attention_counts_however_it_is_computed():
    model, tokens = Llama(config()), torch.zeros(1, 7, dtype=torch.long)
    expected = call_flops(model.config, 7, num_logits=7)
    for way in (attend, attend_fused):
        names = ("attend", "attend_fused")
        patches = [patch(f"annotated_src.attention.{name}", way) for name in names]
        with patches[0], patches[1]:
            assert counted_flops(lambda: model(tokens)) == expected


def test_with_all_logits_it_is_the_count_of_the_cache_chapter():
    for num_tokens, num_cached, _ in CALLS:
        found = call_flops(config(), num_tokens, num_cached, num_logits=num_tokens)
        assert found == all_logits_flops(config(), num_tokens, num_cached)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_cached", "batch_size"), CALLS)
def test_call_bytes_is_what_a_call_reads(
    num_tokens, num_cached, batch_size, num_kv_heads, tied
):
    model = Llama(config(num_kv_heads, tied)).double()
    cache, tokens = filled(model, batch_size, num_cached, num_tokens)
    with torch.no_grad(), BytesRead(model, cache) as counter:
        model(tokens, cache, last_logits_only=True)
    expected = call_bytes(model.config, num_tokens, num_cached, batch_size, width=8)
    assert counter.total == expected


def test_a_byte_that_is_read_twice_counts_once():
    model = Llama(config())
    cache, tokens = filled(model, 1, 0, 2)
    with torch.no_grad(), BytesRead(model, cache) as counter:
        model(tokens, cache)
        model(tokens)
    assert counter.total == call_bytes(model.config, 2)


def test_an_answer_costs_what_generate_counts():
    model = Llama(config())
    data = answer_data(model.config, 5, 8)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    found = counted_flops(lambda: generate(model, tokens, max_new_tokens=8))
    assert data.flops.sum() == found
    assert len(data.flops) == len(data.bytes_read) == 8
    assert data.flops[1:].diff().unique().numel() == 1  # one key more each time
    assert data.bytes_read[0] == call_bytes(config(), 5)
    assert data.bytes_read[-1] == call_bytes(config(), 1, 11)


def test_the_answer_of_the_chapter():
    data = answer_data(SMOLLM2, 512, 64)
    (work, traffic) = draw_answer(data).axes
    assert "87% of the work" in work.texts[0].get_text()
    assert "63 calls of one token: 0.3 each" in work.texts[1].get_text()
    assert traffic.texts[0].get_text() == "prefill: 1.6%"
    assert traffic.texts[1].get_text() == "decode: 98.4% of the traffic"
    assert [len(ax.patches) for ax in (work, traffic)] == [64, 64]
    for ax, heights, unit in (
        (work, data.flops, 1e9),
        (traffic, data.bytes_read, 1e6),
    ):
        drawn = torch.tensor([bar.get_height() for bar in ax.patches])
        assert torch.allclose(drawn.double() * unit, heights, rtol=1e-6)


def test_the_cost_of_a_token_adds_up():
    data = token_cost_data(config())
    assert data.lengths.tolist() == list(range(1, 65))
    expected = [call_flops(config(), 1, s) for s in range(64)]
    assert data.with_cache.tolist() == expected
    assert data.without.tolist() == [call_flops(config(), s) for s in range(1, 65)]


def test_the_cost_of_a_token_at_the_real_sizes():
    data = token_cost_data(SMOLLM2)
    (both, parts) = draw_token_cost(data).axes
    gap = round((data.without[999] / data.with_cache[999]).item())
    assert f"{gap} times" in {text.get_text() for text in both.texts}
    assert gap == 833
    assert "from 3,892 keys on" in parts.texts[-1].get_text()
    rest = data.blocks + data.head
    assert data.attention[3890] <= rest < data.attention[3891]
    assert rest == 2 * 134_479_872


def test_intensity_divides_operations_by_bytes():
    data = intensity_data(config(), [4, 16], most=32)
    assert data.counts.tolist() == [1, 2, 4, 8, 16, 32]
    for i, n in enumerate(data.counts.tolist()):
        assert data.prefill[i] == call_flops(config(), n) / call_bytes(config(), n)
        work, read = (f(config(), 1, 15, n) for f in (call_flops, call_bytes))
        assert data.decode[1, i] == work / read


def test_decode_comes_to_a_ceiling_and_prefill_does_not():
    data = intensity_data(SMOLLM2, (128, 1024, 8192))
    assert (data.prefill.diff() > 0).all()
    assert data.prefill[-1] > 500
    for row, context in zip(data.decode, data.contexts, strict=True):
        ceiling = call_flops(SMOLLM2, 1, context - 1) / (46_080 * context)
        assert 0.9 * ceiling < row[-1] < ceiling
    assert torch.allclose(data.decode[:2, 0], torch.tensor(0.55).double(), atol=0.06)
    figure = draw_intensity(data)
    assert len(figure.axes[0].lines) == 4
