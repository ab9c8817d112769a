import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as TheirGemmaNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from annotated_src.norms import GemmaRMSNorm, LayerNorm, RMSNorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-2  # large enough to be missed when it is left out or put in the wrong place


def pair(ours, theirs, dtype):
    """Both with the same random gain, and bias where there is one."""
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def vectors(dtype):
    """Around 300, whose square float16 does not hold, and around 0.1, where eps is."""
    x = torch.randn(2, 3, 24) + torch.tensor([0.3, -2.0, 5.0])[:, None]
    return (x * torch.tensor([300.0, 0.1])[:, None, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_equals_torch(dtype):
    ours, theirs = pair(LayerNorm(24, EPS), nn.LayerNorm(24, EPS), dtype)
    x = vectors(dtype)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_transformers_exactly(dtype):
    ours, theirs = pair(RMSNorm(24, EPS), LlamaRMSNorm(24, EPS), dtype)
    x = vectors(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_rms_norm_equals_torch():
    ours, theirs = pair(RMSNorm(24, EPS), nn.RMSNorm(24, EPS), torch.float32)
    x = vectors(torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm, GemmaRMSNorm])
def test_eps_is_under_the_root_and_counts(norm):
    x = torch.tensor([[0.1, -0.1]])  # mean 0, mean square 0.01
    assert norm(2, 0.03)(x).tolist()[0] == pytest.approx([0.5, -0.5])
    assert norm(2, 0.0)(x).tolist()[0] == pytest.approx([1, -1])
    assert norm(2, 1e-5)(torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_the_gain_keeps_its_dtype_when_it_is_wider():
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    ours, theirs = pair(RMSNorm(24, EPS), LlamaRMSNorm(24, EPS), torch.float32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_norm_equals_transformers_exactly(dtype):
    ours, theirs = pair(GemmaRMSNorm(24, EPS), TheirGemmaNorm(24, EPS), dtype)
    x = vectors(dtype)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == dtype


def test_gemmas_gain_is_one_more_than_its_weight():
    ours, plain = GemmaRMSNorm(24, EPS), RMSNorm(24, EPS)
    x = vectors(torch.float32)
    assert torch.equal(ours(x), plain(x))  # both fresh: a gain of 1
    with torch.no_grad():
        ours.weight.fill_(0.5)
        plain.weight.fill_(1.5)
    torch.testing.assert_close(ours(x), plain(x))


def test_gemmas_gain_multiplies_before_the_cast():
    """Llama's order would round twice."""
    x = torch.randn(50, 24).bfloat16()
    ours, _ = pair(GemmaRMSNorm(24, EPS), TheirGemmaNorm(24, EPS), torch.bfloat16)
    llama = RMSNorm(24, EPS).bfloat16()
    llama.weight.data = (1 + ours.weight.float()).bfloat16()
    assert not torch.equal(ours(x), llama(x))
    torch.testing.assert_close(ours(x), llama(x), rtol=0.02, atol=0)
