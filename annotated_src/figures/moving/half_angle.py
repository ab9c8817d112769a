"""How far off ChatGLM's clocks are, when their angles are formed in few digits."""

import math
from typing import Any

import torch
from torch import Tensor

from annotated_src.figures.rope_2d import phase_errors_data

PAIRS = (1, 2)  # pair 0 turns by 1 a position and errs least, these err most
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def folded_degrees(radians: Tensor) -> Tensor:
    """Turn an error into degrees from -180 to 180, as a hand shows it."""
    return (radians * 180 / math.pi + 180) % 360 - 180


def half_angle_data() -> dict[str, Any]:
    """Compare each pair's angle, at each position, with the exact one.

    `errors[dtype][pair]` are whole tenths of a degree, to keep the page small. In
    float32 the error is a straight line, and `slopes` has it in degrees a position.
    """
    errors = phase_errors_data().errors
    last = len(errors[torch.float32]) - 1
    tenths = {
        name: {
            str(pair): (10 * folded_degrees(errors[dtype][:, pair])).round().int()
            for pair in PAIRS
        }
        for name, dtype in DTYPES.items()
    }
    slopes = errors[torch.float32][last] / last * 180 / math.pi
    return {
        "degrees": {  # that the exact hand turns from one position to the next
            str(pair): round(math.degrees(10_000.0 ** (-pair / 32)), 6)
            for pair in PAIRS
        },
        "slopes": {str(pair): round(slopes[pair].item(), 6) for pair in PAIRS},
        "errors": {
            name: {pair: row.tolist() for pair, row in rows.items()}
            for name, rows in tenths.items()
        },
    }
