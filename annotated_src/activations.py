"""The bend between two matrix products: GELU, exact and approximated, and SiLU."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

GELU_CUBIC = 0.044715  # Hendrycks & Gimpel 2016, section 2


def gelu_exact(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Weigh x by the probability that a standard normal variable falls below it.

    Source: Hendrycks & Gimpel 2016, section 2; torch `F.gelu(approximate="none")`.
    """
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Follow `gelu_exact` to within 5e-4, with a tanh in place of the error function.

    Source: Hendrycks & Gimpel 2016, section 2; ChatGLM-6B `gelu_impl`.
    """
    # x factored out, for float16: there x**3 overflows from x = 40.4 on.
    inner = math.sqrt(2 / math.pi) * x * (1 + GELU_CUBIC * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Weigh x by its own sigmoid. Also called Swish, with beta = 1.

    Source: Hendrycks & Gimpel 2016; Ramachandran et al. 2017; torch `F.silu`.
    """
    return x * torch.sigmoid(x)
