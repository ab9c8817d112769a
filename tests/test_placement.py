import pytest
import torch

from annotated_src.kv_cache import LayerCache
from annotated_src.placement import place_causally

IS_TOKEN = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()


def cache_of(num_tokens):
    cache = LayerCache(2, 1, 8, 2, torch.float32)
    cache.append(*torch.zeros(2, 2, 1, num_tokens, 2))
    return [cache, cache]


def test_without_cache_and_padding():
    positions, mask = place_causally(torch.zeros(2, 3, dtype=torch.long), None, None)
    assert positions.tolist() == [[0, 1, 2]]
    assert mask.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]


def test_after_a_cache():
    tokens = torch.zeros(2, 2, dtype=torch.long)
    positions, mask = place_causally(tokens, cache_of(3), None)
    assert positions.tolist() == [[3, 4]]
    assert mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_an_empty_cache_is_no_cache():
    tokens = torch.zeros(2, 2, dtype=torch.long)
    for found, expected in zip(
        place_causally(tokens, cache_of(0), None),
        place_causally(tokens, None, None),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_padding_takes_no_position_and_is_not_seen():
    tokens = torch.zeros(2, 2, dtype=torch.long)
    positions, mask = place_causally(tokens, cache_of(3), IS_TOKEN)
    assert positions.tolist() == [[1, 2], [3, 4]]
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (2, 2)])
@pytest.mark.usefixtures("unchecked")
def test_is_token_must_cover_cache_and_call(shape):
    tokens = torch.zeros(2, 2, dtype=torch.long)
    message = rf"must be \(B, S\) = \(2, 5\), got \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=message):
        place_causally(tokens, cache_of(3), torch.ones(shape, dtype=torch.bool))
