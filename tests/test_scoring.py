import math

import pytest
import torch

from annotated_src.loss import next_token_loss
from annotated_src.scoring import perplexity, token_log_probs


@pytest.fixture
def small(make_checkpoint):
    return make_checkpoint()


def test_log_probs_equal_transformers(checkpoint):
    tokens = torch.randint(0, 97, (2, 12))
    found = token_log_probs(checkpoint.model, tokens)
    assert found.shape == (2, 11)
    shares = checkpoint.reference(tokens).logits.log_softmax(dim=-1)
    for row in range(2):
        for i in range(11):
            expected = shares[row, i, tokens[row, i + 1]]
            torch.testing.assert_close(found[row, i], expected, rtol=0, atol=1e-4)


def test_padding_can_be_told(small):
    tokens = torch.randint(0, 97, (2, 12))
    is_token = torch.ones(2, 12, dtype=torch.bool)
    is_token[1, :5] = False
    found = token_log_probs(small.model, tokens, is_token=is_token)
    alone = token_log_probs(small.model, tokens[1:, 5:])
    torch.testing.assert_close(found[1:, 5:], alone, rtol=0, atol=1e-4)


def test_perplexity_is_e_to_the_loss(small):
    tokens = torch.randint(0, 97, (1, 64))  # just the context
    loss = small.reference(tokens, labels=tokens).loss
    assert perplexity(small.model, tokens) == pytest.approx(loss.exp().item(), rel=1e-4)
    ours = next_token_loss(small.model(tokens), tokens).exp().item()
    assert perplexity(small.model, tokens) == pytest.approx(ours, rel=1e-4)


class KnowsHowFarItSees:
    """The more tokens came before, up to three, the surer the next one."""

    def __init__(self, context):
        self.config = type("Config", (), {"max_seq_len": context})
        self.calls = []

    def __call__(self, tokens):
        length = tokens.shape[1]
        assert length <= self.config.max_seq_len
        self.calls.append(tokens[0].tolist())
        sure = torch.zeros(1, length, 100)
        for i in range(length - 1):
            sure[0, i, tokens[0, i + 1]] = min(i + 1, 3)
        return sure


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 11, 16, 29])
@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_long_texts_are_read_in_windows_and_every_token_scored_once(length, stride):
    """Each in the first window that holds it, so by how much stood before it there."""
    model = KnowsHowFarItSees(context=8)
    tokens = torch.arange(length)[None]
    expected, first, step = [], 0, stride or 4
    for i in range(1, length):
        while i >= first + 8:
            first += step
        sure = min(i - first, 3)
        expected.append(math.log(math.exp(sure) + 99) - sure)
    mean = sum(expected) / len(expected)
    assert perplexity(model, tokens, stride) == pytest.approx(math.exp(mean), rel=1e-5)
    assert all(window == sorted(window) for window in model.calls)


@pytest.mark.parametrize("stride", [0, -1, 64, 65])
def test_a_stride_that_cannot_be(small, stride):
    with pytest.raises(ValueError, match=f"stride must be 1 to 63, got {stride}"):
        perplexity(small.model, torch.randint(0, 97, (1, 100)), stride)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("score", [token_log_probs, perplexity])
def test_a_text_without_a_next_token(small, score, length):
    with pytest.raises(ValueError, match=f"takes 2 tokens or more, got {length}"):
        score(small.model, torch.zeros(1, length, dtype=torch.long))
