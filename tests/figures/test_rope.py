import math

import torch

from annotated_src.figures.rope import (
    clocks_data,
    decay_data,
    draw_clocks,
    draw_decay,
    draw_scores,
    scores_data,
)


def test_hands_stand_at_position_times_frequency():
    data = clocks_data()
    theta = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    expected = data.positions[:, None] * theta
    gap = (data.hands - expected + math.pi) % (2 * math.pi) - math.pi
    assert gap.abs().max() < 1e-3
    torch.testing.assert_close(data.turns * 2 * math.pi, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(data.wavelengths.round().int()[[0, 7]], torch.tensor([6, 19869]))


def test_ten_times_the_position_is_the_same_dial_two_pairs_to_the_right():
    data = clocks_data()
    ten, hundred = data.hands[4], data.hands[5]
    assert data.positions[4] * 10 == data.positions[5]
    torch.testing.assert_close(hundred[2:], ten[:-2], rtol=0, atol=1e-4)


def test_couples_stand_elsewhere_but_keep_their_angle():
    data = clocks_data()
    assert (data.couples[:, 0] - data.couples[:, 1]).tolist() == [3, 3]
    between = (data.query_hands - data.key_hands) % (2 * math.pi)
    torch.testing.assert_close(between[0], between[1], rtol=0, atol=1e-9)
    assert [round(d) for d in between[0].rad2deg().tolist()[:4]] == [172, 54, 17, 5]
    moved = (data.query_hands[0] - data.query_hands[1]).abs()
    assert (moved > 0.1).all()


def test_only_turned_scores_are_constant_on_diagonals():
    data = scores_data()
    length = len(data.turned)
    assert data.added.shape == data.turned.shape == (24, 24)
    for offset in range(-length + 2, length - 1):
        turned, added = data.turned.diagonal(offset), data.added.diagonal(offset)
        assert turned.max() - turned.min() < 1e-9
        assert added.max() - added.min() > 0.05
    line = data.added.diagonal(-data.distance)
    assert [round(v.item(), 1) for v in line.aminmax()] == [-0.9, 9.7]
    assert round(data.turned[data.distance, 0].item(), 1) == 2.3
    assert data.turned.diagonal(-1)[0] != data.turned.diagonal(1)[0]


def test_decay_starts_at_one_and_the_larger_base_fades_later():
    data = decay_data()
    assert data.bound[0] == 1
    assert data.bound.max() == 1
    assert data.bound[15:25].max() < 0.55
    assert 0.19 < data.bound[-56:].min() < data.bound[-56:].max() < 0.4
    assert len(data.middles) == len(data.means[10_000.0]) == 13
    small, large = data.means[10_000.0], data.means[100_000.0]
    assert (small.diff() < 0).all()
    assert (large.diff() < 0).all()
    assert (large > small).all()
    assert abs(small[-1]) < 0.02
    assert abs(large[-1] - 0.17) < 0.02


def test_ones_are_the_mean_cosine():
    data = decay_data()
    theta = 100_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    expected = (data.far[99] * theta).cos().mean()
    assert data.far[99] == 100
    torch.testing.assert_close(data.ones[100_000.0][99], expected, rtol=0, atol=1e-5)


def test_figures_draw():
    for figure in (
        draw_clocks(clocks_data()),
        draw_scores(scores_data()),
        draw_decay(decay_data()),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")
