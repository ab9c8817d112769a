from itertools import product

import pytest
import torch

from annotated_src.masks import (
    additive_to_visible,
    causal_mask,
    hide_padding,
    padded_causal_mask,
    prefix_mask,
    visible_to_additive,
    visible_to_masked,
)

SIZES = list(product(range(5), range(4)))  # tokens in this call, tokens in the cache


@pytest.mark.parametrize(("num_tokens", "num_cached"), SIZES)
def test_causal_mask_is_the_double_loop(num_tokens, num_cached):
    mask = causal_mask(num_tokens, num_cached)
    assert mask.shape == (1, 1, num_tokens, num_cached + num_tokens)
    assert mask.dtype == torch.bool
    for t, s in product(range(num_tokens), range(num_cached + num_tokens)):
        assert mask[0, 0, t, s] == (s <= num_cached + t)


@pytest.mark.parametrize(("num_tokens", "num_cached"), SIZES)
def test_padded_mask_is_the_triple_loop(num_tokens, num_cached):
    num_keys = num_cached + num_tokens
    patterns = list(product([False, True], repeat=num_keys))
    mask = padded_causal_mask(torch.tensor(patterns).bool(), num_tokens)
    assert mask.shape == (len(patterns), 1, num_tokens, num_keys)
    for b, t, s in product(
        range(len(patterns)), range(num_tokens), range(num_cached + num_tokens)
    ):
        own = num_cached + t
        assert mask[b, 0, t, s] == (s == own or (s < own and patterns[b][s]))
    assert mask.any(dim=-1).all()  # no row is empty, not even of padding


def test_without_padding_the_masks_are_equal():
    everything = torch.ones(2, 5, dtype=torch.bool)
    mask = padded_causal_mask(everything, 3)
    assert torch.equal(mask, causal_mask(3, 2).expand_as(mask))


def test_too_few_columns():
    with pytest.raises(ValueError, match="is_token covers 2 positions, the call 3"):
        padded_causal_mask(torch.ones(1, 2, dtype=torch.bool), 3)


def test_prefix_mask_is_the_triple_loop():
    contexts = [0, 1, 2, 4, 5]
    mask = prefix_mask(torch.tensor(contexts), 5)
    assert mask.shape == (5, 1, 5, 5)
    for b, t, s in product(range(5), repeat=3):
        assert mask[b, 0, t, s] == (s <= t or s < contexts[b])


def test_the_limits_of_the_prefix_mask():
    mask = prefix_mask(torch.tensor([0, 1, 6]), 6)
    assert torch.equal(mask[:1], causal_mask(6))
    assert torch.equal(mask[1:2], causal_mask(6))
    assert mask[2].all()


def test_hidden_padding_neither_sees_nor_is_seen():
    is_token = torch.tensor([[False, True, True], [True, True, True]])
    mask = prefix_mask(torch.tensor([2, 1]), 3)
    hidden = hide_padding(mask, is_token)
    assert hidden[0, 0].tolist() == [
        [False] * 3,
        [False, True, False],
        [False, True, True],
    ]
    assert torch.equal(hidden[1], mask[1])
    last = hide_padding(mask[:, :, -1:], is_token)  # one query, three keys
    assert torch.equal(last, hidden[:, :, -1:])


def test_the_polarities_turn_into_each_other():
    visible = prefix_mask(torch.tensor([2]), 4)
    masked = visible_to_masked(visible)
    assert masked.dtype == torch.bool
    assert not (masked & visible).any()
    assert (masked | visible).all()
    assert torch.equal(visible_to_masked(masked), visible)
    for hidden in (-torch.inf, -10000.0, -0.5):
        additive = visible_to_additive(visible, hidden)
        assert (additive[visible] == 0).all()
        assert (additive[masked] == hidden).all()
        assert torch.equal(additive_to_visible(additive), visible)
