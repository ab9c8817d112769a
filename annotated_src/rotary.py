"""Rotary position embedding: a token's position turns its queries and keys.

A head's features form pairs, and each pair turns at its own frequency. Two layouts of
the pairs exist: *half-split* (feature i with i + R; Hugging Face checkpoints) and
*interleaved* (feature 2i with 2i + 1; the paper, Meta's checkpoints, Llamas in GGUF).
R is the number of pairs that turn; features after the first 2R pass unturned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_frequencies(
    rotary_dim: int, base: float, device: torch.device | None = None
) -> Float[Tensor, "R"]:
    """Radians that each pair turns per position, from 1 down to nearly 1 / base.

    Raises:
        ValueError: rotary_dim is not even and positive.

    Source: Su et al. 2021, section 3.2.2; transformers `LlamaRotaryEmbedding`.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and positive, got {rotary_dim}")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (exponents / rotary_dim)


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches RoPE to texts longer than those it was first trained on.

    Turns are whole rotations of a pair within original_max_seq_len tokens.

    Raises:
        ValueError: high_freq_factor is not above low_freq_factor, or another value is
            not above 0.
    """

    factor: float  # how many times slower the slowest pairs turn
    low_freq_factor: float  # fewer turns than this: slowed down by the whole factor
    high_freq_factor: float  # more turns than this: left alone
    original_max_seq_len: int

    def __post_init__(self) -> None:
        in_order = 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        if not (
            in_order and 0 < self.factor < math.inf > self.original_max_seq_len > 0
        ):
            raise ValueError(
                f"rope scaling needs 0 < low_freq_factor < high_freq_factor, and a "
                f"factor and original length above 0, got {self}"
            )

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "Llama3Scaling | None":
        """Read the rope_parameters (or rope_scaling) of a config.json.

        None is the plain kind, "default".

        Raises:
            ValueError: another kind of scaling, or a key of Llama 3's kind is missing.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise ValueError(f"rope type is {kind!r}, known are 'default' and 'llama3'")
        try:
            return cls(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_seq_len=int(rope["original_max_position_embeddings"]),
            )
        except KeyError as key:
            raise ValueError(f"config.json has no {key}") from key


def scale_frequencies(
    frequencies: Float[Tensor, "R"], scaling: Llama3Scaling | None
) -> Float[Tensor, "R"]:
    """Slow down the pairs that have hardly turned within the original context.

    A pair that went round many times has shown every angle, and stays as it is. One
    that did not would come to angles never seen. Between both kinds, a linear blend.
    None is plain RoPE: nothing changes.

    Source: transformers `modeling_rope_utils._compute_llama3_parameters`.
    """
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(
    positions: Int[Tensor, "B T"], frequencies: Float[Tensor, "R"], dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T R"], Float[Tensor, "B 1 T R"]]:
    """Cosine and sine of position times frequency: one per pair, alike in all heads.

    The angle is formed in float32: in float16 it is wrong by up to 0.8 rad at position
    2040. Only the finished cosines and sines are cast.
    """
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Float[Tensor, "*batch R2"]) -> Float[Tensor, "*batch R2"]:
    """Turn every half-split pair by 90 degrees: (a, b) becomes (-b, a).

    Source: transformers `rotate_half`; ChatGLM-6B `rotate_half`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(
    x: Float[Tensor, "B heads T H"],
    cos: Float[Tensor, "#B 1 T R"],
    sin: Float[Tensor, "#B 1 T R"],
) -> Float[Tensor, "B heads T H"]:
    """Turn the half-split pairs of every head by the angles in the tables.

    Raises:
        ValueError: the tables have more pairs than a head has.

    Source: Su et al. 2021, eq. 34, features permuted; transformers
    `apply_rotary_pos_emb`.
    """
    turning, passing = _split_rotary(x, cos)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    turned = turning * cos + rotate_half(turning) * sin
    return torch.cat((turned, passing), dim=-1)


def apply_rotary_interleaved(
    x: Float[Tensor, "B heads T H"],
    cos: Float[Tensor, "#B 1 T R"],
    sin: Float[Tensor, "#B 1 T R"],
) -> Float[Tensor, "B heads T H"]:
    """Turn the interleaved pairs of every head by the angles in the tables.

    Raises:
        ValueError: the tables have more pairs than a head has.

    Source: Su et al. 2021, eq. 34; Meta's Llama `apply_rotary_emb`.
    """
    turning, passing = _split_rotary(x, cos)
    even, odd = turning[..., 0::2], turning[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), passing), dim=-1)


def interleaved_to_half_split(
    x: Float[Tensor, "*batch H"],
) -> Float[Tensor, "*batch H"]:
    """Reorder features 0 1 2 3 4 5 to 0 2 4 1 3 5: pair (2i, 2i+1) becomes (i, i+R)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def half_split_to_interleaved(
    x: Float[Tensor, "*batch H"],
) -> Float[Tensor, "*batch H"]:
    """Undo `interleaved_to_half_split`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rows_to_half_split(
    weight: Float[Tensor, "rows D"], num_heads: int
) -> Float[Tensor, "rows D"]:
    """Reorder the output rows of a query or key projection, head by head.

    With them reordered, half-split rotation gives the scores that the interleaved one
    gave before.

    Source: transformers `convert_llama_weights_to_hf.permute`.
    """
    heads = weight.unflatten(0, (num_heads, -1)).transpose(1, 2)  # (heads, D, H)
    return interleaved_to_half_split(heads).transpose(1, 2).flatten(0, 1)


def _split_rotary(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    rotary_dim, head_dim = 2 * cos.shape[-1], x.shape[-1]
    if rotary_dim > head_dim:
        raise ValueError(f"tables turn {rotary_dim} features, a head has {head_dim}")
    return x[..., :rotary_dim], x[..., rotary_dim:]
