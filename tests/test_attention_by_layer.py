import pytest
import torch

from annotated_src.attention import attend
from annotated_src.attention_by_layer import (
    FusedAttention,
    attend_by_layer,
    restore_scores,
    scores_by_layer,
)
from annotated_src.masks import prefix_mask


@pytest.fixture
def heads():
    return torch.randn(3, 2, 4, 5, 8).unbind(0)


@pytest.mark.parametrize("layer", [1, 2, 28])
def test_in_exact_enough_numbers_it_is_attend(heads, layer):
    mask = prefix_mask(torch.tensor([2, 4]), 5)
    found = attend_by_layer(*heads, mask, layer)
    assert torch.allclose(found, attend(*heads, mask), atol=1e-5)


def test_scores_are_divided_by_the_layer_and_restored(heads):
    queries, keys, _ = heads
    once, seven = (scores_by_layer(queries, keys, layer) for layer in (1, 7))
    assert torch.allclose(once, 7 * seven, atol=1e-6)
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert torch.equal(restore_scores(seven, everything, 7), seven * 7)


def test_hidden_scores_are_ten_thousand_times_the_layer(heads):
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 0] = True
    found = restore_scores(torch.randn(2, 4, 5, 5).half(), mask, 3)
    assert found.dtype == torch.float32
    assert (found[..., 1:] == -30000).all()


def test_a_row_with_nothing_visible_averages_everything(heads):
    nothing = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    found = attend_by_layer(*heads, nothing, 4)
    mean = heads[2].mean(dim=2, keepdim=True)
    assert torch.allclose(found, mean.expand_as(found), atol=1e-6)
    assert attend(*heads, nothing).isnan().all()


def test_dividing_first_keeps_half_precision_finite():
    queries = torch.full((1, 1, 1, 64), 90.0).half()
    keys = queries.clone()
    assert (queries @ keys.mT).isinf().all()  # 64 * 90 * 90 is 518400
    assert scores_by_layer(queries, keys, 28).isfinite().all()


def test_the_rows_of_the_fused_matrix_lie_head_by_head():
    layer = FusedAttention(12, 3, 1)
    x = torch.randn(2, 5, 12)
    queries, keys, values = layer.split_heads(layer.qkv_proj(x))
    for head in range(3):
        for part, found in enumerate((queries, keys, values)):
            rows = slice(head * 12 + part * 4, head * 12 + part * 4 + 4)
            weight, bias = layer.qkv_proj.weight[rows], layer.qkv_proj.bias[rows]
            assert torch.allclose(found[:, head], x @ weight.T + bias, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match=r"num_heads \(5\) must divide embed_dim \(12\)"
    ):
        FusedAttention(12, 5, 1)
