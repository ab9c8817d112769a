import pytest
import torch

from annotated_src.kv_cache import LayerCache, cached_length


def some(num_tokens, batch_size=2, num_kv_heads=3, head_dim=4):
    shape = (batch_size, num_kv_heads, num_tokens, head_dim)
    return torch.randn(shape), torch.randn(shape)


def room_for(max_seq_len, dtype=torch.float32):
    return LayerCache(2, 3, max_seq_len, 4, dtype)


@pytest.mark.parametrize("steps", [[6], [1] * 6, [4, 1, 1], [1, 3, 2], [2, 0, 4]])
def test_it_returns_all_tokens_in_order(steps):
    keys, values = some(6)
    cache = room_for(6)  # the last step fills it exactly
    for new_keys, new_values in zip(
        keys.split(steps, 2), values.split(steps, 2), strict=True
    ):
        all_keys, all_values = cache.append(new_keys, new_values)
        assert torch.equal(all_keys, keys[:, :, : cache.length])
        assert torch.equal(all_values, values[:, :, : cache.length])
    assert cache.length == 6


def test_what_it_returns_are_views():
    cache = room_for(8)
    keys, values = cache.append(*some(3))
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    assert values.data_ptr() == cache.values.data_ptr()


def unchanged_by(cache, action, message):
    before = cache.keys.clone(), cache.values.clone(), cache.length
    with pytest.raises(ValueError, match=message):
        action()
    assert torch.equal(cache.keys, before[0])
    assert torch.equal(cache.values, before[1])
    assert cache.length == before[2]


def test_a_full_cache_says_so_and_stays_as_it_was():
    cache = room_for(4)
    cache.append(*some(3))
    message = "it holds 4 tokens, 3 are in use and 2 more were given"
    unchanged_by(cache, lambda: cache.append(*some(2)), message)
    cache.append(*some(1))  # and there is still room for one


@pytest.mark.parametrize(
    ("size", "given"),
    [
        ({"batch_size": 1}, r"\(1, 3, 4\)"),
        ({"num_kv_heads": 1}, r"\(2, 1, 4\)"),
        ({"head_dim": 1}, r"\(2, 3, 1\)"),
    ],
)
def test_other_sizes_are_refused_even_where_they_would_broadcast(size, given):
    cache = room_for(4)
    message = rf"head_dim\) = \(2, 3, 4\), got {given}"
    unchanged_by(cache, lambda: cache.append(*some(2, **size)), message)


@pytest.mark.usefixtures("unchecked")
def test_values_of_another_shape_are_refused():
    cache = room_for(4)
    keys, values = some(2)
    unchanged_by(cache, lambda: cache.append(keys, values[:, :, :1]), "values")


def test_memory_is_two_tensors_of_its_dtype():
    assert room_for(8).num_bytes == 2 * 2 * 3 * 8 * 4 * 4
    assert room_for(8, torch.bfloat16).num_bytes == 2 * 2 * 3 * 8 * 4 * 2


def test_cached_length():
    cache = [room_for(8), room_for(8)]
    assert cached_length(None) == cached_length(cache) == 0
    for layer in cache:
        layer.append(*some(5))
    assert cached_length(cache) == 5


def test_rows_change_places():
    cache = room_for(6)
    keys, values = some(4)
    cache.append(keys, values)
    cache.reorder(torch.tensor([1, 1]))
    more_keys, more_values = some(1)
    found_keys, found_values = cache.append(more_keys, more_values)
    assert torch.equal(found_keys, torch.cat((keys[[1, 1]], more_keys), dim=2))
    assert torch.equal(found_values, torch.cat((values[[1, 1]], more_values), dim=2))
