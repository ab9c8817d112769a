import pytest
import torch
from torch.nn import functional as F

from annotated_src.activations import gelu_exact, gelu_tanh, silu

PAIRS = {
    "gelu_exact": (gelu_exact, F.gelu),
    "gelu_tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (silu, F.silu),
}
X = torch.linspace(-12, 12, 2001, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name, dtype):
    ours, theirs = PAIRS[name]
    # In float64 the cubic's constant must be right to its last digit.
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    x = X.to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=tolerance)
    assert ours(x).dtype == dtype


def test_the_two_gelus_differ_by_less_than_promised():
    apart = (gelu_exact(X) - gelu_tanh(X)).abs().max()
    assert 4e-4 < apart < 5e-4
