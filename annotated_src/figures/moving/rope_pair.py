"""A query's and a key's pair on a circle: their product, wherever the two stand."""

import math
from typing import Any

import torch
from torch import Tensor

from annotated_src.rotary import apply_rotary_interleaved, rope_frequencies, rope_tables

NUM_POSITIONS = 25
PAIRS = 4  # the fast half of the eight pairs in the chapter's clocks
HEAD_DIM, BASE = 16, 10_000.0
QUERY, KEY = (0.8, 0.6), (1.0, 0.0)  # the same content in each pair, both of length 1


def turned_everywhere(content: tuple[float, float]) -> Tensor:
    """Put a head with this content in every pair at every position: (P, pairs, 2)."""
    head = torch.tensor(content, dtype=torch.float64).repeat(HEAD_DIM // 2)
    everywhere = head.expand(1, 1, NUM_POSITIONS, HEAD_DIM)
    frequencies = rope_frequencies(HEAD_DIM, BASE).double()
    positions = torch.arange(NUM_POSITIONS)[None]
    tables = rope_tables(positions, frequencies, torch.float64)
    turned = apply_rotary_interleaved(everywhere, *tables)[0, 0]
    return turned.unflatten(-1, (-1, 2))[:, :PAIRS]


def degrees(arrows: Tensor) -> list[list[float]]:
    """Measure the direction of each arrow, a row for each pair."""
    angles = torch.atan2(arrows[..., 1], arrows[..., 0]) * 180 / math.pi
    return (angles.T % 360).round(decimals=1).tolist()


def rope_pair_data() -> dict[str, Any]:
    """Multiply the query at every position with the key at every position.

    `products[pair][m][n]` has the query at m, the key at n.
    """
    queries, keys = turned_everywhere(QUERY), turned_everywhere(KEY)
    products = torch.einsum("mpx,npx->pmn", queries, keys)
    wavelengths = 2 * math.pi / rope_frequencies(HEAD_DIM, BASE).double()[:PAIRS]
    return {
        "wavelengths": wavelengths.round(decimals=1).tolist(),
        "query": degrees(queries),
        "key": degrees(keys),
        "products": (products.round(decimals=3) + 0.0).tolist(),
    }
