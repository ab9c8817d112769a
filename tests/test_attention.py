import math
from functools import partial
from itertools import product

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama.modeling_llama import repeat_kv as hf

from annotated_src.attention import (
    Attention,
    attend,
    attend_folded,
    attend_fused,
    repeat_kv,
)
from annotated_src.kv_cache import LayerCache
from annotated_src.masks import causal_mask, padded_causal_mask
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables

GROUPS = pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
POSITIONS = torch.tensor([[2, 0, 7, 40, 3], [1, 1, 5, 9, 30]])
IS_TOKEN = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()


def heads(num_kv_heads, num_tokens=5, num_keys=7, dtype=torch.float64):
    """Six query heads of width 4."""
    queries = 2 * torch.randn(2, 6, num_tokens, 4, dtype=dtype)
    return queries, *2 * torch.randn(2, 2, num_kv_heads, num_keys, 4, dtype=dtype)


def attend_in_loops(queries, keys, values, mask):
    mask = mask.expand(queries.shape[0], -1, -1, -1)
    group, scale = queries.shape[1] // keys.shape[1], math.sqrt(queries.shape[3])
    out = torch.zeros(*queries.shape[:3], values.shape[3], dtype=values.dtype)
    for b, n, t in product(*map(range, queries.shape[:3])):
        visible = [s for s in range(keys.shape[2]) if mask[b, 0, t, s]]
        own_keys, own_values = keys[b, n // group], values[b, n // group]
        raw = [math.exp(queries[b, n, t] @ own_keys[s] / scale) for s in visible]
        for s, weight in zip(visible, raw, strict=True):
            out[b, n, t] += weight / sum(raw) * own_values[s]
    return out


MASKS = {"causal": causal_mask(5, 2), "padded": padded_causal_mask(IS_TOKEN, 5)}


@GROUPS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_loops_and_all_ways_to_attend_are_equal(num_kv_heads, mask):
    given = heads(num_kv_heads)
    expected = attend_in_loops(*given, mask)
    # The weights are float32, even here.
    torch.testing.assert_close(attend(*given, mask), expected, atol=1e-6, rtol=1e-6)
    folded = attend_folded(*given, mask)
    torch.testing.assert_close(folded, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(attend_fused(*given, mask), expected)


@GROUPS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folding_is_attend_in_every_dtype(num_kv_heads, mask, dtype):
    given = heads(num_kv_heads, dtype=dtype)
    found, expected = attend_folded(*given, mask), attend(*given, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@GROUPS
def test_folding_one_query(num_kv_heads):
    given = heads(num_kv_heads, num_tokens=1, dtype=torch.float32)
    mask = padded_causal_mask(IS_TOKEN, 1)
    torch.testing.assert_close(attend_folded(*given, mask), attend(*given, mask))


def test_folding_copies_no_key():
    """The keys that meet the queries lie where the cache's keys lie."""
    queries, keys, values = heads(2)
    places, real = [], torch.Tensor.__matmul__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: places.append(b.data_ptr()) or real(a, b),
        )
        attend_folded(queries, keys, values, MASKS["causal"])
    assert places == [keys.data_ptr(), values.data_ptr()]


def test_an_exporter_may_set_the_way_to_attend():
    layer, _ = pair(2)
    x, calls = torch.randn(2, 5, 24), []
    before = layer(x, rotation()[0], causal_mask(5))

    def folded(*given):
        calls.append(len(given))
        return attend_folded(*given)

    layer.attend = folded
    torch.testing.assert_close(layer(x, rotation()[0], causal_mask(5)), before)
    assert calls == [4]
    assert pair(2)[0].attend is attend_fused  # that instance alone


def test_a_masked_key_does_not_count_however_well_it_answers():
    queries, keys, values = heads(6)
    before = attend(queries, keys, values, MASKS["causal"])
    keys[:, :, 3:] = 1e3 * queries[:, :, :1]
    values[:, :, 3:] = 1e3
    after = attend(queries, keys, values, MASKS["causal"])
    assert torch.equal(after[:, :, :1], before[:, :, :1])


@pytest.mark.usefixtures("unchecked")
def test_values_may_have_another_width():
    queries, keys, values = heads(2)
    wide = torch.cat((values, values[..., :1]), dim=-1)
    for function in (attend, attend_fused, attend_folded):
        found = function(queries, keys, wide, MASKS["causal"])
        expected = function(queries, keys, values, MASKS["causal"])
        torch.testing.assert_close(found[..., :4], expected)
        torch.testing.assert_close(found[..., 4], expected[..., 0])


def test_heads_are_repeated_side_by_side():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(repeat_kv(x, 2), hf(x, 2))
    assert torch.equal(repeat_kv(x, 2)[:, [0, 1, 5]], x[:, [0, 0, 2]])


def pair(num_kv_heads, dtype=torch.float32):
    """The layer here and the layer of transformers, with the same weights."""
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        head_dim=16,
        attn_implementation="eager",
    )
    ours = Attention(24, 6, num_kv_heads, head_dim=16, bias=False)
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    theirs = LlamaAttention(config, layer_idx=0)
    renamed = {k.replace("out_", "o_"): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    return ours.to(dtype), theirs.to(dtype)


def rotation(dtype=torch.float32, positions=POSITIONS):
    cos, sin = rope_tables(positions, rope_frequencies(16, 500.0), dtype)
    doubled = tuple(torch.cat((x, x), -1)[:, 0] for x in (cos, sin))
    return partial(apply_rotary, cos=cos, sin=sin), doubled


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_equals_transformers(num_kv_heads, dtype):
    """As close as the dtype allows: the same roundings, up to the order of sums."""
    ours, theirs = pair(num_kv_heads, dtype)
    rotate, doubled = rotation(dtype)
    x = torch.randn(2, 5, 24).to(dtype)
    mask = padded_causal_mask(IS_TOKEN[:, 2:], 5)
    additive = torch.zeros(mask.shape).to(dtype).masked_fill(~mask, -torch.inf)
    found = ours(x, rotate, mask)
    assert found.dtype == dtype
    expected = theirs(x, doubled, additive)[0].float()
    apart = (found.float() - expected).norm() / expected.norm()
    assert apart < 2 * torch.finfo(dtype).eps


@GROUPS
@pytest.mark.parametrize("chunks", [[1] * 5, [3, 2], [1, 4]])
def test_with_a_cache_it_is_the_same(num_kv_heads, chunks):
    layer, _ = pair(num_kv_heads)
    x = torch.randn(2, 5, 24)
    whole = layer(x, rotation()[0], causal_mask(5))
    cache = LayerCache(2, num_kv_heads, 5, 16, torch.float32)
    parts = []
    for part, positions in zip(
        x.split(chunks, dim=1), POSITIONS.split(chunks, dim=1), strict=True
    ):
        mask = causal_mask(part.shape[1], cache.length)
        parts.append(layer(part, rotation(positions=positions)[0], mask, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("bias", [True, False])
def test_all_four_projections_have_a_bias_or_none(bias):
    names = {name for name, _ in Attention(24, 6, 2, 16, bias).named_parameters()}
    wanted = {f"{x}_proj.weight" for x in ("q", "k", "v", "out")}
    assert names == wanted | {w.replace("weight", "bias") for w in wanted if bias}


@pytest.mark.parametrize("num_kv_heads", [4, 12, 0, -1])
def test_heads_that_do_not_divide(num_kv_heads):
    message = rf"num_kv_heads \({num_kv_heads}\) must divide num_heads \(6\)"
    with pytest.raises(ValueError, match=message):
        Attention(24, 6, num_kv_heads, 16, bias=False)
