"""The numbers behind the figures of the chapter on activations."""

import math

import pytest
import torch

from annotated_src.activations import GELU_CUBIC, gelu_exact, gelu_tanh
from annotated_src.figures.activations import (
    LEVELS,
    TAYLOR_CUBIC,
    bend_data,
    constant_data,
    draw_bend,
    draw_constant,
    draw_product,
    gated_product,
    plain_product,
    product_data,
)


@pytest.fixture(scope="module")
def bend():
    return bend_data()


@pytest.fixture(scope="module")
def constant():
    return constant_data()


@pytest.fixture(scope="module")
def product():
    return product_data()


def test_the_dips_are_where_the_figure_says(bend):
    x, value = bend.lowest["GELU"]
    assert (round(x, 2), round(value, 2)) == (-0.75, -0.17)
    x, value = bend.lowest["SiLU"]
    assert (round(x, 2), round(value, 2)) == (-1.28, -0.28)
    assert value == pytest.approx(x + 1, abs=1e-3)


def test_the_slopes_are_the_slopes_of_the_values(bend):
    step = bend.x[1] - bend.x[0]
    middle = (bend.x[:-1] + bend.x[1:]) / 2
    smooth = middle.abs() > step  # ReLU has a corner at 0
    for name, values in bend.values.items():
        between = (bend.slopes[name][:-1] + bend.slopes[name][1:]) / 2
        torch.testing.assert_close(
            (values.diff() / step)[smooth], between[smooth], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "at", "slope"), [("GELU", math.sqrt(2), 1.129), ("SiLU", 2.399, 1.0998)]
)
def test_the_steepest_points(bend, name, at, slope):
    slopes = bend.slopes[name]
    assert bend.x[slopes.argmax()].item() == pytest.approx(at, abs=1e-3)
    assert slopes.max().item() == pytest.approx(slope, abs=1e-4)
    torch.testing.assert_close(slopes + slopes.flip(0), torch.ones_like(slopes))


def test_the_papers_constant_balances_its_error(constant):
    error = constant.gate_errors[GELU_CUBIC]
    assert -error.min().item() == pytest.approx(error.max().item(), rel=1e-3)
    assert constant.x[error.argmin()].item() == pytest.approx(1.242, abs=2e-3)
    assert constant.x[error.argmax()].item() == pytest.approx(2.592, abs=2e-3)
    assert constant.peak == pytest.approx(1.789e-4, abs=1e-7)


def test_taylors_constant_is_better_near_0_only(constant):
    fitted, taylor = (constant.gate_errors[c].abs() for c in (GELU_CUBIC, TAYLOR_CUBIC))
    near = (constant.x > 0) & (constant.x < 0.5)
    assert (taylor[near] < fitted[near]).all()
    assert taylor.max() > 1.7 * fitted.max()
    assert constant.x[taylor.argmax()].item() == pytest.approx(2.293, abs=2e-3)


def test_half_steps_are_the_most_that_rounding_moves(constant):
    exact = gelu_exact(constant.wide)
    for name in ("float16", "bfloat16"):
        rounded = exact.to(getattr(torch, name)).double()
        ratio = (rounded - exact).abs() / constant.half_steps[name]
        assert ratio.max() <= 1
        assert ratio.max() > 0.9


def test_float16_tells_the_two_gelus_apart_on_the_left_only(constant):
    wide, seen = constant.wide, constant.gelu_error > constant.half_steps["float16"]
    assert not seen[wide > -0.65].any()
    assert seen[(wide < -0.75) & ((wide + 1.885).abs() > 0.05)].all()
    difference = (gelu_tanh(wide) - gelu_exact(wide)).abs()
    assert torch.equal(constant.gelu_error, difference)
    assert difference.max().item() == pytest.approx(4.73e-4, abs=1e-6)


def test_the_gated_layer_is_the_product(product):
    xy = product.axis[None, :] * product.axis[:, None]
    torch.testing.assert_close(product.gated_layer, xy)


def test_the_plain_layer_is_the_product_only_near_0(product):
    axis = product.axis
    xy = axis[None, :] * axis[:, None]
    smaller = torch.minimum(axis.abs()[None, :], axis.abs()[:, None]) * xy.sign()
    error = (product.plain_layer - xy).abs()
    near = (axis.abs()[None, :] < 0.3) & (axis.abs()[:, None] < 0.3)
    assert error[near].max() < 0.006
    assert error[0, 0] > 12
    assert (product.plain_layer[0, 0] - smaller[0, 0]).abs() < 0.05


def test_a_plain_unit_has_stripes_and_a_gated_one_has_not(product):
    assert (product.plain_unit == product.plain_unit[0]).all()
    assert not (product.gated_unit == product.gated_unit[0]).all()
    slope = product.gated_unit.diff(dim=0) / (product.axis[1] - product.axis[0])
    torch.testing.assert_close(slope, product.plain_unit[1:])


def test_a_smaller_scale_widens_the_region():
    pair = torch.tensor([[[2.0, 2.0]]], dtype=torch.float64)
    errors = [abs(plain_product(s)(pair)[0, 0, 0].item() - 4) for s in (1.0, 0.5, 0.1)]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]


def test_the_caption_counts_the_parameters():
    count = [
        sum(p.numel() for p in m().parameters()) for m in (plain_product, gated_product)
    ]
    assert count == [22, 12]


def test_the_figures_draw(bend, constant, product):
    assert len(draw_bend(bend).axes) == 2
    assert len(draw_constant(constant).axes) == 2
    axes = draw_product(product).axes
    assert len(axes) == 4
    # Two gated units: every level but 0 is written in two corners.
    assert len(axes[3].texts) == 2 * (len(LEVELS) - 1)
