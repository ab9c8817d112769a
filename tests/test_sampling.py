import torch

from annotated_src.sampling import greedy


def test_greedy_takes_the_best_of_each_row():
    logits = torch.tensor([[-3.0, -1.0, -2.0], [4.0, 4.5, 5.0]])
    assert greedy(logits).tolist() == [1, 2]


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[1.0, 7.0, 7.0, 7.0]])).tolist() == [1]


def test_greedy_does_not_pass_over_infinity():
    logits = torch.tensor([[-torch.inf, -1e30, -torch.inf]])
    assert greedy(logits).tolist() == [1]
