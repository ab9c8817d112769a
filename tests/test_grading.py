"""Agreement, divergence and perplexity of two models' scores on one text."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from annotated_src.grading import Grades, grade, kl_divergence, text_perplexity
from annotated_src.models.llama import Llama, tiny_config
from annotated_src.scoring import perplexity


def by_loops(reference, other):
    """The divergence of one token, in Python."""
    p, q = (
        [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        for scores in (reference.tolist(), other.tolist())
    )
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_a_model_agrees_with_itself():
    logits = torch.randn(2, 5, 11)
    assert grade(logits, logits) == Grades(1.0, 0.0, 0.0)
    # A constant added to all scores of a token changes no probability.
    moved = grade(logits, logits + torch.randn(2, 5, 1))
    assert moved.agreement == 1
    assert abs(moved.worst_kl) < 1e-6


def test_divergence_is_the_sum_over_the_vocabulary_and_torch_s():
    reference, other = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    found = kl_divergence(reference, other)
    for b in range(2):
        for t in range(3):
            expected = by_loops(reference[b, t], other[b, t])
            assert found[b, t].item() == pytest.approx(expected)
    logs = (other.log_softmax(-1), reference.log_softmax(-1))
    theirs = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, theirs)
    assert not torch.allclose(found, kl_divergence(other, reference))
    assert (found > 0).all()


def test_grades_by_hand():
    reference, other = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    reference[..., 0] = 1.0  # id 0 is the best everywhere
    other[0, 0, 0], other[0, 1:3, 0] = 1.0, 2.0
    other[0, 3, 1] = 1.0  # and here it is id 1
    found = grade(reference, other)
    each = [by_loops(reference[0, t], other[0, t]) for t in range(4)]
    assert found.agreement == 0.75
    assert found.mean_kl == pytest.approx(sum(each) / 4)
    assert found.worst_kl == pytest.approx(max(each))


def test_padding_does_not_count():
    reference, other = torch.randn(2, 2, 4, 9)
    is_token = torch.tensor([[False, False, True, True], [True] * 4])
    before = grade(reference, other, is_token)
    other[0, :2] = 100 * torch.randn(2, 9)
    assert grade(reference, other, is_token) == before
    assert grade(reference, other) != before


def test_impossible_tokens_add_nothing_or_everything():
    reference, other = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)
    reference[..., 2] = -torch.inf
    assert kl_divergence(reference, other).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(other, reference).item() == math.inf
    assert kl_divergence(reference, reference).item() == 0


def test_arrays_of_numpy_do_as_well():
    reference, other = torch.randn(2, 1, 6, 9)
    tokens = torch.randint(9, (1, 6))
    arrays = reference.numpy(), other.numpy()
    assert grade(*arrays) == grade(reference, other)
    assert grade(arrays[0], other) == grade(reference, other)
    assert text_perplexity(arrays[0], tokens) == text_perplexity(reference, tokens)
    assert isinstance(arrays[0], np.ndarray)


def test_perplexity_of_logits_is_that_of_their_model():
    model, tokens = Llama(tiny_config()).eval(), torch.randint(96, (1, 20))
    found = text_perplexity(model(tokens), tokens)
    assert found == pytest.approx(perplexity(model, tokens), rel=1e-5)
    flat = torch.zeros(2, 5, 8)
    tokens = torch.randint(8, (2, 5))
    assert text_perplexity(flat, tokens) == pytest.approx(8)


def test_what_does_not_fit_is_refused(unchecked):
    logits = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"one shape, got .*\(2, 5, 8\), \(2, 4, 8\)"):
        grade(logits, logits[:, 1:])
    nobody = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="chooses 0"):
        grade(logits, logits, nobody)
    with pytest.raises(ValueError, match="must choose tokens out of"):
        grade(logits, logits, ~nobody[:, 1:])
    for tokens in (torch.zeros(2, 4).long(), torch.zeros(1, 5).long()):
        with pytest.raises(ValueError, match="must be the"):
            text_perplexity(logits, tokens)
    with pytest.raises(ValueError, match="two or more"):
        text_perplexity(logits[:, :1], torch.zeros(2, 1).long())
