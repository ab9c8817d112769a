from itertools import product

import pytest
import torch

from annotated_src.masks import causal_mask, padded_causal_mask

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
