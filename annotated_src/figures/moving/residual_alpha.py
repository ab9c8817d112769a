"""What a stack of 28 blocks keeps of its input, for one alpha after the other."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from annotated_src.figures.block import (
    CHATGLM,
    DIM,
    PRE_NORM,
    Sublayer,
    Wiring,
    follow,
    in_parts,
    random_blocks,
    sublayers_of,
)

NUM_LAYERS = 28
ALPHAS = (1.0, 1.5, 2.0, 56**0.25, 4.0, 5.5, 56**0.5, 10.0, 14.0)


def share_of_each(
    wiring: Wiring, x: Tensor, sublayers: list[Sublayer], alpha: float
) -> Tensor:
    """Split the last vector, normed, into the input's part and each block's."""
    count = len(sublayers) + 1
    split = in_parts(sublayers, count)
    start = F.pad(x[None], (0, 0, 0, 0, 0, 0, 0, count - 1))  # all of it is part 0
    parts = split[0][0](follow(wiring, start, split, alpha)[-1])
    whole = parts.sum(0)
    along = (parts * whole).sum(dim=(1, 2, 3)) / whole.square().sum()
    return torch.cat((along[:1], along[1:].unflatten(0, (-1, 2)).sum(1)))


def measure(
    wiring: Wiring, x: Tensor, sublayers: list[Sublayer], alpha: float
) -> dict[str, list[float]]:
    """Follow x through the stack: its size, block by block, and what is left of it.

    `stream` is the root mean square before each block and behind the last. `shares` is
    the input's share of the last vector, then what each block's two sublayers added.
    """
    stream = torch.stack(follow(wiring, x, sublayers, alpha)[::2])
    sizes = stream.square().mean(dim=(1, 2, 3)).sqrt()
    shares = share_of_each(wiring, x, sublayers, alpha)
    return {
        "stream": sizes.double().round(decimals=2).tolist(),
        "shares": (shares.double().round(decimals=4) + 0.0).tolist(),
    }


@torch.no_grad()
def residual_alpha_data() -> dict[str, Any]:
    """Measure ChatGLM's wiring for every alpha, and Llama's, which has none.

    All have the same random blocks.
    """
    torch.manual_seed(0)
    sublayers = sublayers_of(random_blocks(NUM_LAYERS))
    x = torch.randn(1, 32, DIM)  # (B, T, D)
    root = math.sqrt(2 * NUM_LAYERS)
    return {
        "root": ALPHAS.index(root),  # of these is ChatGLM-6B's
        "alphas": [round(alpha, 2) for alpha in ALPHAS],
        "chatglm": [measure(CHATGLM, x, sublayers, alpha) for alpha in ALPHAS],
        "llama": measure(PRE_NORM, x, sublayers, 1.0),
    }
