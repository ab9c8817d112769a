import math

import torch

from annotated_src.figures.rope_2d import (
    WORDS,
    draw_phase_errors,
    draw_two_clocks,
    draw_wander,
    phase_errors_data,
    two_clocks_data,
    wander_data,
)

HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


def test_the_place_stops_at_the_blank_where_the_step_starts():
    data = two_clocks_data()
    assert data.words == WORDS
    assert data.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 4, 4, 4, 4],
        [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4],
    ]
    assert WORDS[4] == "[MASK]"
    assert WORDS[7] == "<sop>"


def test_hands_stand_at_position_times_frequency():
    data = two_clocks_data()
    assert data.hands.shape == (2, 2, 11)
    degrees = torch.tensor([45.0, 15.0], dtype=torch.float64)
    expected = data.positions[:, None, :] * degrees[:, None]
    torch.testing.assert_close(data.hands.rad2deg(), expected, rtol=0, atol=1e-9)
    answer, blank = data.hands[0, :, 7:], data.hands[0, :, 4:5]
    assert torch.equal(answer, blank.expand(2, 4))
    assert (data.hands[1, :, :7] == 0).all()


def test_errors_are_lines_in_float32():
    errors = phase_errors_data().errors[FULL]
    assert errors.shape == (2048, 32)
    steps = errors[2047] / 2047
    line = torch.arange(2048)[:, None] * steps
    assert (errors - line).abs().max() < 1e-3
    ends = [round(e, 2) for e in errors[2047, :5].tolist()]
    assert ends == [0.0, 0.22, 0.32, -0.13, -0.13]
    assert errors[2047, 5:].abs().max() < 0.12


def test_errors_are_lanes_in_float16():
    data = phase_errors_data()
    errors, line = data.errors[HALF], data.errors[FULL]
    at = errors.abs().argmax().item()
    assert (at // 32, at % 32) == (2040, 2)
    assert round(errors.abs().max().item(), 2) == 0.82
    assert round(math.degrees(errors.abs().max().item())) == 47
    # What the second rounding adds: nothing, then multiples of 1/4 or 1/8, as the angle
    # passes 512 (pair 1, a frequency of exactly 3/4) or 128 (pair 2, 9/16 and no more).
    added = (errors - line).abs()
    jumps = [(added[:, pair] > 1e-3).nonzero()[0].item() for pair in (1, 2)]
    assert jumps == [683, 229]
    assert added[683:1366, 1].max().item() == 0.25
    assert added[1366:, 1].max().item() == 0.5


def test_errors_agree_with_plain_python():
    data = phase_errors_data()
    for position, pair in ((1000, 3), (2040, 2), (77, 30)):
        true = position * 10_000 ** (-pair / 32)
        frequency = torch.tensor(10_000 ** (-pair / 32)).half()
        product = torch.tensor(float(frequency) * position, dtype=torch.float64).half()
        error = data.errors[HALF][position, pair].item()
        assert abs(error - (float(product) - true)) < 1e-6
    assert data.errors[BRAIN].abs().max() > 2 * math.pi


def test_a_score_wanders_only_where_angles_are_rounded():
    data = wander_data()
    assert data.distance == 6
    assert round(data.true, 2) == 0.74
    ends = {dtype: scores.aminmax() for dtype, scores in data.scores.items()}
    assert all(len(scores) == 2042 for scores in data.scores.values())
    assert ends[FULL].max - ends[FULL].min < 1e-4
    assert [round(e.item(), 2) for e in ends[HALF]] == [0.71, 0.78]
    assert [round(e.item(), 2) for e in ends[BRAIN]] == [0.6, 1.0]
    early = data.scores[BRAIN][: 1024 - data.distance].aminmax()
    assert [round(e.item(), 2) for e in early] == [0.61, 0.84]
    widths = [s.max() - s.min() for s in data.scores[HALF].split(512)]
    assert widths[0] < widths[1] < widths[3]


def test_figures_draw():
    for figure in (
        draw_two_clocks(two_clocks_data()),
        draw_phase_errors(phase_errors_data()),
        draw_wander(wander_data()),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")
