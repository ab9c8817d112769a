import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from annotated_src.embedding import ScaledEmbedding, TokenEmbedding


def test_equals_torch():
    ours, theirs = TokenEmbedding(7, 4), nn.Embedding(7, 4)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[0, 6, 3], [3, 3, 1]])  # both ends of the table
    assert torch.equal(ours(tokens), theirs(tokens))


def test_no_tokens_give_no_vectors():
    assert TokenEmbedding(7, 4)(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 4)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (0, 7), (-2, 9)])
def test_ids_outside_the_table(low, high):
    message = f"token ids must be 0 to 6, got ids from {low} to {high}"
    with pytest.raises(ValueError, match=message):
        TokenEmbedding(7, 4)(torch.tensor([[2, low], [high, 1]]))


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
@pytest.mark.usefixtures("unchecked")
def test_tokens_must_be_rows(shape):
    with pytest.raises(ValueError, match=r"must be \(B, T\), got shape .*3,?\)"):
        TokenEmbedding(7, 4)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scaled_one_equals_transformers_exactly(dtype):
    ours = ScaledEmbedding(7, 3072).to(dtype)
    theirs = GemmaTextScaledWordEmbedding(7, 3072, None, embed_scale=3072**0.5)
    theirs.to(dtype).load_state_dict(ours.state_dict())
    tokens = torch.tensor([[0, 6, 3], [3, 3, 1]])
    assert torch.equal(ours(tokens), theirs(tokens))


def test_the_factor_is_rounded_to_the_weights_dtype():
    ours = ScaledEmbedding(7, 3072).bfloat16()
    found, tokens = ours.weight.detach()[None], torch.arange(7)[None]
    assert torch.equal(ours(tokens), found * 55.5)
    assert not torch.equal(ours(tokens), (found.float() * 3072**0.5).bfloat16())


@pytest.mark.usefixtures("unchecked")
def test_the_scaled_one_can_be_exported():
    ours, tokens = ScaledEmbedding(7, 4), torch.tensor([[0, 6, 3]])
    exported = torch.export.export(ours, (tokens,)).module()
    assert torch.equal(exported(tokens), ours(tokens))


def test_the_scaled_one_names_ids_outside_the_table():
    with pytest.raises(ValueError, match="must be 0 to 6, got ids from 0 to 7"):
        ScaledEmbedding(7, 4)(torch.tensor([[0, 7]]))
