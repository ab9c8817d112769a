from itertools import product

import pytest
import torch

from annotated_src.positions import padded_positions, positions_after


@pytest.mark.parametrize("num_cached", [0, 1, 5])
def test_positions_count_on_from_the_cache(num_cached):
    found = positions_after(num_cached, 3)
    assert found.tolist() == [[num_cached, num_cached + 1, num_cached + 2]]
    assert positions_after(num_cached, 0).shape == (1, 0)


def test_padding_is_not_counted():
    patterns = list(product([False, True], repeat=5))
    found = padded_positions(torch.tensor(patterns))
    for row, numbers in zip(patterns, found.tolist(), strict=True):
        for place, number in enumerate(numbers):
            assert number == max(sum(row[: place + 1]) - 1, 0)
