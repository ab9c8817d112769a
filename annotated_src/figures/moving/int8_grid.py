"""Numbers of a moving figure: the levels of 8 and 4 bits, while one weight grows."""

from typing import Any

import torch
from torch import Tensor

from annotated_src.checkpoint import load_model
from annotated_src.quantize import dequantize_groups, quantize_groups
from annotated_src.small_chatglm import SMALL_CHATGLM

WEIGHT = "blocks.0.ffn.up_proj.weight"
TIMES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SHARING = {"matrix": None, "row": None, "group": 32}
NUM_BINS = 33


def int8_grid_data() -> dict[str, Any]:
    """Take a matrix of the small ChatGLM, and make its largest weight larger.

    `grids[bits][sharing]` goes by TIMES. Each has three places: the outlier's group,
    the rest of its row, the other rows; of each the middle scale, the share of weights
    that become 0, and the error, root mean square, as a share of the weights'. The
    outlier itself does not count.
    """
    weight = load_model(SMALL_CHATGLM).get_parameter(WEIGHT).detach()
    outlier = weight.flatten()[weight.abs().argmax()].item()
    largest = abs(outlier)
    counts = weight.flatten().histc(NUM_BINS, -largest, largest)
    return {
        "shape": list(weight.shape),
        "outlier": round(outlier, 4),
        "rms": round(weight.square().mean().sqrt().item(), 4),
        "histogram": [int(count) for count in counts],
        "times": list(TIMES),
        "grids": {
            str(bits): {
                sharing: [_grid(weight, times, bits, sharing) for times in TIMES]
                for sharing in SHARING
            }
            for bits in (8, 4)
        },
    }


def quantize_shared(weight: Tensor, bits: int, sharing: str) -> tuple[Tensor, Tensor]:
    """Return integers, and the scale of each weight, all in the matrix's shape."""
    rows = weight.reshape(1, -1) if sharing == "matrix" else weight
    integers, scale = quantize_groups(rows, bits, SHARING[sharing])
    every = dequantize_groups(torch.ones_like(integers), scale)
    return integers.view_as(weight), every.view_as(weight)


def places(weight: Tensor) -> list[Tensor]:
    """Mark the outlier's group, the rest of its row, the other rows; never itself."""
    row, column = divmod(int(weight.abs().argmax()), weight.shape[1])
    own = torch.zeros_like(weight, dtype=torch.bool)
    own[row] = True
    group = torch.zeros_like(own)
    group[row, column // 32 * 32 : column // 32 * 32 + 32] = True
    outlier = torch.zeros_like(own)
    outlier[row, column] = True
    return [group & ~outlier, own & ~group, ~own]


def _grid(weight: Tensor, times: int, bits: int, sharing: str) -> dict[str, Any]:
    marked = places(weight)
    others = marked[0] | marked[1] | marked[2]
    grown = torch.where(others, weight, times * weight)
    integers, scale = quantize_shared(grown, bits, sharing)
    error = integers * scale - grown
    return {
        "places": [_measure(grown, integers, scale, error, part) for part in marked],
        "all": _measure(grown, integers, scale, error, others),
    }


def _measure(
    weight: Tensor, integers: Tensor, scale: Tensor, error: Tensor, part: Tensor
) -> list[float]:
    zeros = (integers[part] == 0).float().mean().item()
    share = (error[part].square().mean() / weight[part].square().mean()).sqrt().item()
    return [
        float(f"{scale[part].median().item():.4g}"),
        round(zeros, 4),
        float(f"{share:.3g}"),
    ]
