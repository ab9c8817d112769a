import math

import pytest
import torch

from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables
from annotated_src.rotary_2d import (
    apply_rotary_2d,
    half_frequencies,
    rope_table,
    rotation,
    table_rows,
)


def test_frequencies_are_those_of_rope_to_eleven_bits():
    exact = rope_frequencies(64, 10000.0)
    rounded = half_frequencies(64)
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded, exact.half())
    assert not torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_table_has_the_dtype_of_the_frequencies(dtype):
    frequencies = half_frequencies(8).to(dtype)
    cos, sin = rope_table(20, frequencies)
    assert cos.dtype == sin.dtype == dtype
    angle = torch.tensor(13.0, dtype=dtype) * frequencies[1]
    assert cos[13, 1] == angle.cos()
    assert sin[13, 1] == angle.sin()


def test_rows_of_the_table_by_position():
    cos, _ = rope_table(6, half_frequencies(4).float())
    found = table_rows(cos, torch.tensor([[5, 0], [2, 2]]))
    assert found.shape == (2, 1, 2, 2)
    assert torch.equal(found[0, 0], cos[[5, 0]])
    assert torch.equal(found[1, 0], cos[[2, 2]])


@pytest.mark.parametrize(
    ("positions", "range_"), [([[6]], "6 to 6"), ([[-1, 2]], "-1")]
)
def test_positions_beyond_the_table(positions, range_):
    cos, _ = rope_table(6, half_frequencies(4).float())
    message = f"positions must be 0 to 5, got positions {range_}"
    with pytest.raises(ValueError, match=message):
        table_rows(cos, torch.tensor(positions))


def test_each_row_of_positions_turns_its_own_part():
    """Spelled out with sines: feature i of a half pairs with i + a quarter."""
    head_dim, half, quarter = 8, 4, 2
    x = torch.randn(1, 1, 3, head_dim)
    positions = torch.tensor([[[4, 0, 7], [0, 9, 2]]])
    found = rotation(positions, head_dim, torch.float32)(x)
    frequency = [1.0, float(torch.tensor(10000.0**-0.5).half())]
    for t in range(3):
        for row in range(2):
            for i in range(quarter):
                angle = int(positions[0, row, t]) * frequency[i]
                a, b = (float(x[0, 0, t, row * half + i + k]) for k in (0, quarter))
                turned = (
                    a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle),
                )
                for k, value in zip((0, quarter), turned, strict=True):
                    assert found[0, 0, t, row * half + i + k] == pytest.approx(
                        value, abs=1e-5
                    )


def test_one_row_is_plain_rope_but_for_the_rounding():
    x, positions = torch.randn(2, 3, 5, 8), torch.randint(0, 9, (2, 1, 5))
    found = rotation(positions, 8, torch.float32)(x)
    tables = rope_tables(positions[:, 0], half_frequencies(8).float(), torch.float32)
    assert torch.allclose(found, apply_rotary(x, *tables), atol=1e-6)


def test_tables_must_turn_the_whole_head():
    table = rope_table(3, half_frequencies(4).float())
    turn = tuple(table_rows(part, torch.tensor([[0, 1]])) for part in table)
    with pytest.raises(ValueError, match="tables turn 4 features, a head has 8"):
        apply_rotary_2d(torch.zeros(1, 1, 2, 8), [turn])


def test_negative_positions_and_heads_without_pairs():
    with pytest.raises(
        ValueError, match="positions must be 0 to 2, got positions -1 to 0"
    ):
        rotation(torch.tensor([[[0, 2], [-1, 0]]]), 8, torch.float32)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4: 6"):
        rotation(torch.tensor([[[0], [0]]]), 6, torch.float32)
