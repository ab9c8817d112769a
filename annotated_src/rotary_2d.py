"""ChatGLM's rotary embedding: two positions a token, each turns one half of a head.

Angles are formed in the model's own dtype from frequencies rounded to float16, as the
original does. `rotary` keeps them in float32.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from annotated_src.rotary import apply_rotary, rope_frequencies

Table = tuple[Tensor, Tensor]  # cosines, sines
BASE = 10000.0


def half_frequencies(
    rotary_dim: int, base: float = BASE, device: torch.device | None = None
) -> Float[Tensor, "R"]:
    """Round `rope_frequencies` to float16: so they are in a float32 model, too.

    Raises:
        ValueError: rotary_dim is not even and positive.

    Source: ChatGLM-6B `RotaryEmbedding.__init__`.
    """
    return rope_frequencies(rotary_dim, base, device).half()


def rope_table(
    num_positions: int, frequencies: Float[Tensor, "R"]
) -> tuple[Float[Tensor, "P R"], Float[Tensor, "P R"]]:
    """Cosine and sine of every position below num_positions, for all frequencies.

    Positions, angles, cosines and sines all have the dtype of frequencies.

    Source: ChatGLM-6B `RotaryEmbedding.forward`.
    """
    positions = torch.arange(num_positions, device=frequencies.device)
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return angles.cos(), angles.sin()


def table_rows(
    table: Float[Tensor, "P R"], positions: Int[Tensor, "B T"]
) -> Float[Tensor, "B 1 T R"]:
    """Look the positions up, one row of the table for each token.

    Raises:
        ValueError: a position outside the table.

    Source: ChatGLM-6B `apply_rotary_pos_emb_index`.
    """
    low, high = (int(end) for end in positions.aminmax())
    if low < 0 or high >= len(table):
        raise ValueError(
            f"positions must be 0 to {len(table) - 1}, got positions {low} to {high}"
        )
    return table[positions][:, None]


def apply_rotary_2d(
    x: Float[Tensor, "B heads T H"], tables: Sequence[Table]
) -> Float[Tensor, "B heads T H"]:
    """Cut each head into equal parts and turn each part by its own cosines and sines.

    Raises:
        ValueError: the tables do not turn all features of a head.

    Source: ChatGLM-6B `SelfAttention.forward`.
    """
    turned = sum(2 * cos.shape[-1] for cos, _ in tables)
    if turned != x.shape[-1]:
        raise ValueError(f"tables turn {turned} features, a head has {x.shape[-1]}")
    parts = x.chunk(len(tables), dim=-1)
    return torch.cat(
        [apply_rotary(part, *table) for part, table in zip(parts, tables, strict=True)],
        dim=-1,
    )


def rotation(
    positions: Int[Tensor, "B rows T"], head_dim: int, dtype: torch.dtype
) -> partial[Tensor]:
    """Make the function that turns queries and keys: one part of a head for each row.

    Raises:
        ValueError: a negative position, or a head that does not part into pairs.
    """
    num_rows = positions.shape[1]
    if head_dim % (2 * num_rows):
        raise ValueError(f"head_dim must be a multiple of {2 * num_rows}: {head_dim}")
    frequencies = half_frequencies(head_dim // num_rows, device=positions.device)
    # As long as it must be. A negative position is not in any table.
    cos, sin = rope_table(max(0, int(positions.max())) + 1, frequencies.to(dtype))
    tables = [
        (table_rows(cos, row), table_rows(sin, row)) for row in positions.unbind(1)
    ]
    return partial(apply_rotary_2d, tables=tables)
