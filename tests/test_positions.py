from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annotated_src.positions import (
    BlankIds,
    answer_advance,
    mask_positions,
    padded_positions,
    positions_after,
    prompt_positions,
)


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


IDS = BlankIds(sop=90, gmask=91, mask=92)
TEXT = st.lists(st.integers(0, 9), max_size=6)


def plain(row, rows):
    """The positions of one row, token by token."""
    sop = row.index(IDS.sop)
    at_gmask = IDS.gmask in row
    blank = row.index(IDS.gmask if at_gmask else IDS.mask)
    place, step = [], []
    for i in range(len(row)):
        place.append(i if i < sop else blank)
        step.append(0 if i < sop else i - sop + 1)
    if rows == 2:
        return [place, step]
    return [list(range(len(row))) if at_gmask else place]


@st.composite
def prompt(draw):
    """Text, masks of both kinds or of one, <sop>, an answer; all in any place."""
    masks = draw(st.lists(st.sampled_from([IDS.mask, IDS.gmask]), min_size=1))
    row = draw(st.permutations([*draw(TEXT), *masks, IDS.sop]))
    return [*row, *draw(TEXT), *draw(st.sampled_from([[], [IDS.sop, 3]]))]


@given(prompt(), st.sampled_from([1, 2]))
def test_positions_of_a_prompt_token_by_token(row, rows):
    found = prompt_positions(torch.tensor([row]), IDS, rows)
    assert found.tolist() == [plain(row, rows)]


def test_rows_of_a_batch_share_nothing():
    batch = [[1, 91, 90, 2, 3, 4], [92, 1, 2, 3, 90, 4], [1, 2, 92, 91, 90, 90]]
    for rows in (1, 2):
        together = prompt_positions(torch.tensor(batch), IDS, rows)
        assert together.tolist() == [plain(row, rows) for row in batch]


def test_which_mask_is_preferred():
    both = torch.tensor([[5, 92, 91, 91, 92, 90]])
    assert mask_positions(both, IDS.gmask, IDS.mask).tolist() == [2]
    assert mask_positions(both, IDS.mask, IDS.gmask).tolist() == [1]


def test_one_row_stays_only_at_mask():
    found = answer_advance(torch.tensor([[5, 92, 90], [5, 91, 90]]), IDS, 1)
    assert found.tolist() == [[0], [1]]
    found = answer_advance(torch.tensor([[5, 92, 90], [5, 91, 90]]), IDS, 2)
    assert found.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 91, 90], [1, 91, 2], [90, 92, 1]], r"no <sop> \(id 90\) in row 1"),
        ([[1, 91, 2], [1, 2, 2]], r"no <sop> \(id 90\) in row 0, 1"),
        ([[1, 2, 90]], r"no mask token \(id 91 or 92\) in row 0"),
    ],
)
def test_a_prompt_without_its_special_tokens(rows, message):
    for num_rows in (1, 2):
        with pytest.raises(ValueError, match=message):
            prompt_positions(torch.tensor(rows), IDS, num_rows)
