"""Fewer bits a weight, for any of the models: int8 rows, int4 groups, int8 products.

A group of weights becomes small integers and one scale, scale * integer being close to
what was there. A group is a whole row, or some 32 columns of it. ChatGLM-6B's own
quantisation, which its checkpoints hold, is in `chatglm_quantize`.
"""

import re
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

int8_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def quantize_groups(
    weight: Float[Tensor, "rows cols"], bits: int, group_size: int | None = None
) -> tuple[Int8[Tensor, "rows cols"], Float32[Tensor, "rows groups"]]:
    """Round each group of a row, or whole rows, to whole multiples of its scale.

    The scale is the largest magnitude / 127.5 or 7.5, the range of all 256 or 16
    integers: the largest weight, too, lies half a step from one. No weight moves by
    more than half its scale, but for float32's own rounding. Zeros stay zeros.

    Raises:
        ValueError: bits not 4 or 8, or a group_size that does not divide the columns.

    Source: torchao `choose_qparams_affine`, SYMMETRIC; `quantize_affine`.
    """
    size = _check_sizes(weight.shape[1], bits, group_size)
    groups = weight.float().unflatten(1, (-1, size))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(dim=-1) / ((highest - lowest) / 2)  # NaN, if there is one
    scale = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
    steps = groups * (1 / scale)[..., None]
    integers = steps.round().clamp(lowest, highest).to(torch.int8)
    return integers.flatten(1), scale


def dequantize_groups(
    integers: Int8[Tensor, "rows cols"], scale: Float[Tensor, "rows groups"]
) -> Float[Tensor, "rows cols"]:
    """Make weights again: each integer times the scale of its group."""
    groups = integers.unflatten(1, (scale.shape[1], -1))  # (rows, groups, group_size)
    return (groups * scale[..., None]).flatten(1)


def pack_int4(integers: Int8[Tensor, "rows cols"]) -> UInt8[Tensor, "rows half"]:
    """Put two integers of -8 to 7 into a byte, the even column in its low half."""
    low, high = (integers & 15).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_int4(packed: UInt8[Tensor, "rows half"]) -> Int8[Tensor, "rows cols"]:
    """Take them out again: the upper bit of each half is its sign."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8)
    return (halves ^ 8) - 8  # 0 to 7 stay, 8 to 15 become -8 to -1


class WeightOnlyLinear(nn.Module):
    """Stand in for a linear layer: integers in memory, weights again when it is used.

    This saves memory, not arithmetic. Gradients pass through to x.

    Source: torchao `Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`.
    """

    integers: Tensor
    scale: Tensor

    def __init__(
        self, linear: nn.Linear, bits: int, group_size: int | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        integers, scale = quantize_groups(linear.weight, bits, group_size)
        stored = pack_int4(integers) if bits == 4 else integers
        self.register_buffer("integers", stored.contiguous())  # (rows, cols * bits / 8)
        self.register_buffer("scale", scale)  # (rows, groups)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*rest cols"]) -> Float[Tensor, "*rest rows"]:
        integers = unpack_int4(self.integers) if self.bits == 4 else self.integers
        weight = dequantize_groups(integers, self.scale).to(x.dtype)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        group_size = self.in_features // self.scale.shape[1]
        sizes = f"{self.in_features} -> {self.out_features}"
        return f"{sizes}, {self.bits} bits, groups of {group_size}"


class DynamicLinear(WeightOnlyLinear):
    """Quantise the activations too, each token as it comes: the products are integers.

    A token is rounded as a row of weights is. Sums of int8 products are exact in int32,
    below 131,072 columns. For inference on the CPU: rounding has no gradient.

    Source: torchao `Int8DynamicActivationInt8WeightConfig`; torch `_int_mm`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, bits=8)

    def forward(self, x: Float[Tensor, "*rest cols"]) -> Float[Tensor, "*rest rows"]:
        tokens, token_scale = quantize_groups(x.reshape(-1, self.in_features), 8)
        sums = int8_product(tokens, self.integers.T)  # int32 (tokens, rows)
        y = sums * token_scale * self.scale.T
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


SCHEMES: dict[str, Callable[[nn.Linear, int | None], WeightOnlyLinear]] = {
    "int8-weight-only": lambda linear, _: WeightOnlyLinear(linear, bits=8),
    "int8-dynamic": lambda linear, _: DynamicLinear(linear),
    "int4-grouped": lambda linear, size: WeightOnlyLinear(linear, 4, size),
}


def quantize_(
    model: nn.Module,
    scheme: str,
    match: str | None = None,
    group_size: int | None = None,
) -> list[str]:
    """Swap linear layers of a model in place; return their names.

    All of them, the head too, or those in whose name (`blocks.0.ffn.up_proj`) the
    regular expression match is found. Embeddings stay as they are, and so does a head
    that is one. group_size is of int4-grouped, 32 if not said. Another call may swap
    other layers by another scheme. On the meta device sizes can be had without weights.

    Raises:
        ValueError: an unknown scheme, or a group_size for one without groups; nothing
            matches, or what does is quantised already; a group_size that does not
            divide the columns, or weights that are not finite. Nothing is swapped then.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {sorted(SCHEMES)}, got {scheme!r}")
    bits = 4 if scheme == "int4-grouped" else 8
    if bits == 8 and group_size is not None:
        raise ValueError(f"{scheme} has no groups, got group_size {group_size}")
    if bits == 4 and group_size is None:
        group_size = 32
    linears = _find_linears(model, match)
    for name, linear in linears.items():
        _check_sizes(linear.in_features, bits, group_size, f"{name}: ")
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite")
    for name in (names := list(linears)):
        linear = linears.pop(name)  # so that its weight is freed before the next
        model.set_submodule(name, SCHEMES[scheme](linear, group_size))
    return names


def weight_bytes(module: nn.Module) -> int:
    """Memory of the parameters and buffers; what is shared counts once."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _find_linears(model: nn.Module, match: str | None) -> dict[str, nn.Linear]:
    try:
        pattern = re.compile(match or "")
    except re.error as error:
        raise ValueError(f"match {match!r} is no regular expression: {error}") from None
    found = {name: part for name, part in model.named_modules() if pattern.search(name)}
    for name, part in found.items():
        if isinstance(part, WeightOnlyLinear):
            raise ValueError(f"{name} is quantised already, to {part.bits} bits")
    linears = {n: part for n, part in found.items() if isinstance(part, nn.Linear)}
    if not linears:
        raise ValueError(f"no linear layer of the model matches {match!r}")
    return linears


def _check_sizes(cols: int, bits: int, group_size: int | None, where: str = "") -> int:
    """Return how many columns share a scale: group_size, or all of them if None."""
    size = cols if group_size is None else group_size
    if bits not in (4, 8):
        raise ValueError(f"{where}bits must be 4 or 8, got {bits}")
    if cols < 1 or size < 1 or cols % size:
        raise ValueError(f"{where}group_size {size} must divide {cols} columns")
    if cols * bits % 8:
        raise ValueError(f"{where}4 bits need an even number of columns, got {cols}")
    return size
