import math

import torch

from annotated_src.attention_by_layer import HIDDEN_SCORE, restore_scores
from annotated_src.figures.half_precision import (
    PRODUCT_FIRST,
    draw_fills,
    draw_gaps,
    fills_data,
    gaps_data,
    spacing,
)


def test_spacing_is_that_of_float16():
    x = torch.tensor([2.0**-24, 2.0**-14, 1.0, 3000.0, 10_000.0, 65504.0]).half()
    expected = [2.0**-24, 2.0**-24, 2.0**-10, 2.0, 8.0, 32.0]
    assert spacing(x).tolist() == expected


def at(data, score):
    """The gaps at the grid's point nearest to a score."""
    place = (data.scores - score).abs().argmin()
    return {name: gap[place].item() for name, gap in data.gaps.items()}


def test_dividing_by_the_layer_moves_both_ends_and_little_between():
    data = gaps_data()
    first, last = data.gaps["layer 1"], data.gaps["layer 28"]
    assert first[0] == 2.0**-24
    assert last[0] == 28 * 2.0**-24
    between = (data.scores > 28 * 2.0**-14) & (data.scores < 65504)
    ratio = (last / first)[between]
    assert 0.5 < ratio.min() < 1 < ratio.max() < 2
    assert at(data, 3000) == {PRODUCT_FIRST: 2.0**5 / math.sqrt(128)} | {
        "layer 1": 2.0,
        "layer 28": 28 / 16,
    }


def test_each_way_of_computing_ends_where_float16_overflows():
    data = gaps_data()
    assert [round(end) for end in data.ends.values()] == [5790, 65504, 1834112]
    for name, gap in data.gaps.items():
        finite = data.scores[gap.isfinite()]
        assert data.ends[name] / 1.05 < finite[-1] < data.ends[name] * 1.001
        assert gap[len(finite) :].isnan().all()
    assert list(data.gaps) == list(data.ends) == [PRODUCT_FIRST, "layer 1", "layer 28"]


def test_only_minus_twenty_leaks_and_only_infinity_gives_nan():
    data = fills_data()
    token, padding = data.weights
    assert data.fills == (-20.0, HIDDEN_SCORE, -math.inf)
    assert token[0, :2].sum() > 0.95
    assert (token[1:, :2] == 0).all()
    assert torch.equal(token[1], token[2])
    torch.testing.assert_close(padding[:2], torch.full((2, 6), 1 / 6))
    assert padding[2].isnan().all()


def test_the_middle_column_is_what_the_package_computes():
    data = fills_data()
    masks = torch.stack((data.visible, torch.zeros_like(data.visible)))
    scores = data.scores.expand(1, 1, 2, -1)
    restored = restore_scores(scores, masks[None, None], 1)
    torch.testing.assert_close(restored.softmax(dim=-1)[0, 0], data.weights[:, 1])


def test_figures_draw():
    for figure in (draw_gaps(gaps_data()), draw_fills(fills_data())):
        assert figure._repr_png_().startswith(b"\x89PNG")
