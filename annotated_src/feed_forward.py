"""The feed-forward network: each token on its own, wide in the middle."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Widen, bend, narrow. Source: Vaswani et al. 2017, eq. 2."""

    def __init__(self, embed_dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, ffn_dim)
        self.down_proj = nn.Linear(ffn_dim, embed_dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedFeedForward(nn.Module):
    """Widen twice, let one copy open and close the other, narrow. Seldom with biases.

    With silu it is SwiGLU (Llama), with gelu GEGLU (Gemma).

    Source: Shazeer 2020, eq. 6; transformers `LlamaMLP`.
    """

    def __init__(
        self, embed_dim: int, ffn_dim: int, activation: Activation, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, ffn_dim, bias=bias)
        self.up_proj = nn.Linear(embed_dim, ffn_dim, bias=bias)
        self.down_proj = nn.Linear(ffn_dim, embed_dim, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate = self.activation(self.gate_proj(x))  # (B, T, F)
        return self.down_proj(gate * self.up_proj(x))
