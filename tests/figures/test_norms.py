import math

import pytest
import torch

from annotated_src.figures import norm_placement, norms
from annotated_src.figures.style import BookFigure


def test_geometry_is_the_three_four_five_triangle():
    data = norms.geometry_data()
    torch.testing.assert_close(data.x, torch.tensor([8.0, 6.0]))
    torch.testing.assert_close(data.shifted, torch.tensor([-4.0, 6.0]))
    torch.testing.assert_close(data.layer_norm, torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(data.rms_norm, torch.tensor([1.6, 1.2]))
    for point in (data.layer_norm, data.rms_norm, data.rms_norm_shifted):
        assert point.norm().item() == pytest.approx(data.radius, rel=1e-5)


def test_rms_norm_keeps_the_direction_and_layer_norm_forgets_the_shift():
    a, b = norms.geometry_data(shift=6.0), norms.geometry_data(shift=-2.0)
    torch.testing.assert_close(a.layer_norm, b.layer_norm)
    assert not torch.allclose(a.rms_norm_shifted, b.rms_norm_shifted, atol=0.1)
    ratio = a.shifted / a.rms_norm_shifted
    assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=1e-5)


def test_running_sum_rounds_at_every_step():
    x = torch.tensor([[2048.0, 1.0, 1.0], [1.0, 1.0, 2048.0]]).half()
    assert norms.running_sum(x).tolist() == [[2048, 2048, 2048], [1, 2, 2050]]


def test_counts_stop_at_two_to_the_precision():
    data = norms.stall_data()
    assert data.float32[-1] == 4096
    assert data.float16[-1] == 2**11
    assert data.bfloat16[-1] == 2**8
    assert data.bfloat16[:256].tolist() == list(range(1, 257))


def test_float16_falls_off_on_both_sides():
    data = norms.cliff_data(width=1024, points=45, draws=5)
    small, large = data.sizes < 5e-5, data.sizes > 200
    fits = ~data.all_float16.isnan()
    assert (data.all_float16[small] == 1).all()  # an RMS of zero
    assert data.all_float16[large & fits].isinf().all()
    assert data.float16_squares[large & fits].isinf().all()
    middle = (data.sizes > 0.01) & (data.sizes < 4)
    assert (data.float16_squares[middle] < 1e-4).all()
    # A sum of D squares of size r overflows before one square does.
    first = data.sizes[data.all_float16.isinf()][0]
    assert 6 < first < 20  # sqrt(65504 / 1024) = 8
    assert first < data.sizes[data.float16_squares.isinf()][0]
    assert not fits[-1]  # 1e5 is no float16


def test_bfloat16_errs_everywhere_and_float32_inside_nowhere():
    data = norms.cliff_data(width=1024, points=45, draws=5)
    assert data.all_bfloat16.isfinite().all()
    assert (data.all_bfloat16 > 0.03).all()
    assert (data.float32_inside < 1e-6).all()


def test_without_a_norm_the_stream_overflows():
    stream = norm_placement.measure(norm_placement.no_norm, 12).stream
    assert stream[4] > 1000
    assert not stream[-1].isfinite()


def test_pre_norm_grows_and_post_norm_does_not():
    pre = norm_placement.measure(norm_placement.pre_norm, 16).stream
    post = norm_placement.measure(norm_placement.post_norm, 16).stream
    assert (pre.diff() > 0).all()
    assert 3 < pre[-1] < 6
    torch.testing.assert_close(post[1:], torch.ones_like(post[1:]), rtol=1e-4, atol=0)


def test_gradients_compound_after_post_norm_only():
    data = norm_placement.depth_data(num_layers=24, num_seeds=2)
    assert data.gradients_post[0] / data.gradients_post[-1] > 15
    assert data.gradients_pre[0] / data.gradients_pre[-1] < 10
    assert data.gradients_post_relu[0] / data.gradients_post_relu[-1] < 1.5


def test_post_norm_block_computes_what_it_says():
    torch.manual_seed(0)
    (block,) = norm_placement.random_blocks(1)
    x, mask = torch.randn(1, 2, 64), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with torch.no_grad():
        for gain in (block.attention_norm.weight, block.ffn_norm.weight):
            gain.uniform_(0.5, 1.5)
        out = norm_placement.post_norm(block, x, lambda heads: heads, mask)
        scale = (out / block.ffn_norm.weight).square().mean(dim=-1).sqrt()
    torch.testing.assert_close(scale, torch.ones(1, 2), rtol=1e-4, atol=0)


def test_matrices_keep_the_scale_of_what_they_read():
    torch.manual_seed(0)
    for gated in (True, False):
        for name, weight in norm_placement.random_blocks(1, gated)[
            0
        ].named_parameters():
            if weight.dim() == 2:
                wanted = 1 / math.sqrt(weight.shape[1])
                assert weight.std().item() == pytest.approx(wanted, rel=0.1), name


@pytest.mark.parametrize(
    ("data", "draw"),
    [
        (norms.geometry_data, norms.draw_geometry),
        (norms.stall_data, norms.draw_stall),
        (norms.cliff_data, norms.draw_cliffs),
        (norm_placement.depth_data, norm_placement.draw_depth),
    ],
)
def test_figures_draw(data, draw):
    figure = draw(data())
    assert isinstance(figure, BookFigure)
    assert figure._repr_png_().startswith(b"\x89PNG")
