"""Weights in 8 or 4 bits, activations as they are: ChatGLM-6B's quantisation.

A row of a weight becomes small integers and one scale, scale * integer being close to
what was there. The layers store that, and make weights of it each time they are used:
this saves memory, not arithmetic.
"""

from typing import Any

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor, nn
from torch.nn import functional as F


def quantize_rows(
    weight: Float[Tensor, "rows cols"], bits: int
) -> tuple[Int8[Tensor, "rows stored"], Float16[Tensor, "rows"]]:
    """Round each row to whole multiples of its scale: its largest magnitude / 127 or 7.

    With 4 bits a byte holds two columns, the even one in its high half. All zeros, or
    all too small for a scale in half (below 3.8e-6 for 8 bits), become zeros; the
    original divides by that scale of 0.

    Raises:
        ValueError: bits not 4 or 8, no columns, an odd number of them with 4 bits, or
            weights that are not finite or too large for a scale in half.

    Source: ChatGLM-6B `quantization.QuantizedLinear`; `compress_int4_weight`.
    """
    scale = _row_scales(weight, bits)
    divisor = scale.masked_fill(scale == 0, 1)[:, None]
    # A scale below 6e-5 has few digits left in half, and may round so far down that
    # the quotient reaches 190. The original then wraps around: 128 becomes -128.
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = (weight / divisor).round().clamp(lowest, highest).to(torch.int8)
    if bits == 8:
        return integers, scale
    even, odd = integers[:, ::2], integers[:, 1::2]
    return (even << 4) | (odd & 15), scale


def dequantize_rows(
    storage: Int8[Tensor, "rows stored"],
    scale: Float[Tensor, "rows"],
    bits: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """Make weights again: integer times scale, rounded once, to dtype.

    Raises:
        ValueError: bits not 4 or 8, or not one scale for each row.

    Source: ChatGLM-6B `quantization.extract_weight_to_half`.
    """
    _check_bits(bits)
    if scale.shape != storage.shape[:1]:
        raise ValueError(f"{storage.shape[0]} rows with {tuple(scale.shape)} scales")
    if bits == 4:
        # The right shift brings the sign along: 1111 in either half is -1.
        halves = (storage >> 4, (storage << 4) >> 4)
        storage = torch.stack(halves, dim=-1).flatten(1)  # (rows, 2 * stored)
    return (storage * scale.float()[:, None]).to(dtype)


class QuantizedLinear(nn.Module):
    """Stand in for a linear layer, its weight kept in 8 or 4 bits.

    Made from sizes it is all zeros, to be filled by a loader. weight and weight_scale
    are buffers: they are not trained, but gradients pass through to x. For that,
    autograd keeps the weight in full until backward; the original makes it again.
    Casting the module casts the scales: to float32 exactly, to bfloat16 not.

    Raises:
        ValueError: bits not 4 or 8, no in_features, or an odd number with 4 bits.

    Source: ChatGLM-6B `quantization.QuantizedLinear`, `W8A16Linear`.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, bias: bool = True
    ) -> None:
        super().__init__()
        _check_sizes(in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits = bits
        storage = torch.zeros(out_features, in_features * bits // 8, dtype=torch.int8)
        self.register_buffer("weight", storage)
        scale = torch.zeros(out_features, dtype=torch.float16)
        self.register_buffer("weight_scale", scale)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """Quantise the weight of a linear layer; the bias is its own, shared."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bits, bias=False)
        layer.weight, layer.weight_scale = quantize_rows(linear.weight, bits)
        layer.bias = linear.bias
        return layer

    def forward(self, x: Float[Tensor, "*rest cols"]) -> Float[Tensor, "*rest rows"]:
        weight = dequantize_rows(self.weight, self.weight_scale, self.bits, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits"


def quantize_linears(model: Any, bits: int) -> Any:
    """Swap every linear layer of model.blocks, in place; return the model.

    Embedding and head stay as they are. A model on the meta device gets layers there,
    to be filled from a checkpoint that holds storage and scales.

    Raises:
        ValueError: as `quantize_rows`, or there is no linear layer. Nothing is swapped.

    Source: ChatGLM-6B `quantization.quantize`.
    """
    linears = [
        (parent, name, child)
        for parent in model.blocks.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not linears:
        raise ValueError("model.blocks has no linear layer: is it quantised already?")
    for _, _, linear in linears:
        _row_scales(linear.weight, bits)  # refuses what cannot be done
    while linears:  # popped, so that each full weight is freed before the next
        parent, name, linear = linears.pop()
        setattr(parent, name, QuantizedLinear.from_linear(linear, bits))
    return model


def _row_scales(weight: Tensor, bits: int) -> Tensor:
    _check_sizes(weight.shape[1], bits)
    largest = weight.detach().abs().amax(dim=1)  # NaN, if there is one
    # In the weight's own dtype: float32 and half may differ in the last bit.
    scale = (largest / (2 ** (bits - 1) - 1)).half()
    if scale.is_meta:
        return scale  # no values to check
    broken = (~scale.isfinite()).nonzero().flatten().tolist()
    if broken:
        row, value = broken[0], largest[broken[0]].item()
        raise ValueError(
            f"row {row} has a weight of magnitude {value}: it must be finite, and its "
            f"scale for {bits} bits at most 65504, the limit of half"
        )
    return scale


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")


def _check_sizes(cols: int, bits: int) -> None:
    _check_bits(bits)
    if cols < 1 or cols * bits % 8:
        raise ValueError(f"{bits} bits need whole bytes of columns, got {cols} columns")
