import math

import numpy as np
import pytest

from annotated_src.figures.moving.half_angle import half_angle_data

THETA = {pair: 10_000 ** (-int(pair) / 32) for pair in ("1", "2")}


@pytest.fixture(scope="module")
def data():
    return half_angle_data()


def rounded(number, digits):
    """Keep so many binary digits, the nearest, as a float format without limits."""
    fraction, exponent = math.frexp(number)
    return math.ldexp(round(fraction * 2**digits), exponent - digits)


def fold(degrees):
    return (degrees + 180) % 360 - 180


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("pair", ["1", "2"])
def test_errors_are_those_of_numbers_rounded_by_hand(data, dtype, digits, pair):
    frequency = rounded(rounded(THETA[pair], 11), digits)
    errors = data["errors"][dtype][pair]
    assert len(errors) == 2048
    for position, tenths in enumerate(errors):
        angle = rounded(rounded(position, digits) * frequency, digits)
        wanted = math.degrees(angle - position * THETA[pair])
        assert abs(fold(wanted - tenths / 10)) < 0.051


def test_numpy_rounds_float16_alike(data):
    positions = np.arange(2048, dtype=np.float16)
    for pair, theta in THETA.items():
        angles = (positions * np.float16(theta)).astype(float)
        degrees = np.degrees(angles - np.arange(2048) * theta)
        assert np.abs(
            degrees - np.array(data["errors"]["float16"][pair]) / 10
        ).max() < (0.051)


def test_in_float32_the_frequency_alone_is_rounded(data):
    for pair, theta in THETA.items():
        step = math.degrees(float(np.float16(theta)) - theta)
        assert data["slopes"][pair] == pytest.approx(step, abs=1e-5)
        assert data["degrees"][pair] == pytest.approx(math.degrees(theta), abs=1e-5)
