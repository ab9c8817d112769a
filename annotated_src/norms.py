"""Keep every token's vector at a known scale, whatever the layers before it did."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Shift each vector to mean 0, scale it to variance 1, then apply gain and bias.

    Computed in float32, returned in the dtype of the input.

    Source: Ba et al. 2016, eq. 4; torch `nn.LayerNorm`.
    """

    def __init__(self, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embed_dim))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        wide = x.float()
        centred = wide - wide.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)  # over D, not D - 1
        unit = centred * torch.rsqrt(variance + self.eps)
        return (unit * self.weight.float() + self.bias.float()).type_as(x)


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then apply a gain.

    The gain multiplies after the return to the input's dtype, as in Llama.

    Source: Zhang & Sennrich 2019, eq. 4; transformers `LlamaRMSNorm`.
    """

    def __init__(self, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embed_dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        # float16 overflows at 65504, so the square of 256 would already be inf.
        wide = x.float()
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(mean_square + self.eps)).type_as(x)


class GemmaRMSNorm(nn.Module):
    """`RMSNorm` whose gain is 1 + weight, multiplied in float32, before the cast.

    A weight of zeros leaves the unit vector as it is.

    Source: transformers `GemmaRMSNorm`.
    """

    def __init__(self, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(embed_dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        wide = x.float()
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        unit = wide * torch.rsqrt(mean_square + self.eps)
        return (unit * (1 + self.weight.float())).type_as(x)
