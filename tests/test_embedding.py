import pytest
import torch
from torch import nn

from annotated_src.embedding import TokenEmbedding


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
