"""Differences are found, and the first one is told: type, shape, dtype, values."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from annotated_src.checks.comparing import difference
from annotated_src.checks.describing import describe


@dataclass
class Pair:
    left: object
    right: object


X = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
SAME = [
    (X, X.clone()),
    (X, X.clone().requires_grad_()),
    (torch.tensor(2.5), 2.5 * torch.ones(())),
    (2.5, torch.tensor(2.5)),
    (True, torch.tensor(True)),
    (3, np.int64(3)),
    (float("nan"), float("nan")),
    (torch.inf, torch.inf),
    ([1, 2], (1, 2)),
    (np.arange(3), torch.arange(3)),
    (np.arange(3), np.arange(3)[::-1][::-1]),
    (np.arange(3), np.arange(3)[::-1].copy()[::-1]),
    (torch.arange(3), np.arange(3)[::-1].copy()[::-1]),
    (np.array(2.5), 2.5 * torch.ones((), dtype=torch.float64)),
    (2.5, np.array(2.5)),
    (np.array(["a", None]), np.array(["a", None])),
    ((x for x in "ab"), (x for x in "ab")),  # nothing to compare
    (lambda: 1, lambda: 1),
    ({"a": X}, {"a": X}),
    ({1, 2}, {2, 1}),
    (b"ab", b"ab"),
    (None, None),
    (Pair(1, X), Pair(1, X)),
    (nn.Linear(2, 2), None),
]
OTHER = [
    (X, [[1.0, 2.0]], "type", ""),
    (X, None, "type", ""),
    (X, X[:1], "shape", ""),
    (X, X.half(), "dtype", ""),
    (X, torch.tensor([[1.0, 2.0], [3.5, torch.nan]]), "values", ""),
    (X, torch.zeros(2, 2), "values", ""),
    (torch.tensor([True]), torch.tensor([1]), "dtype", ""),
    (2.5, "2.5", "type", ""),
    (True, 1, "type", ""),
    (1, True, "type", ""),
    (3, 4, "values", ""),
    (3, 3.00001, "type", ""),
    (3, 3.0, "type", ""),
    (float("inf"), 0.0, "values", ""),
    (float("-inf"), float("inf"), "values", ""),
    ([1, 2], [1, 2, 3], "length", ""),
    ([1, 2], 1, "type", ""),
    ([1, [2, X]], [1, [2, X + 1]], "values", "[1][1]"),
    ([(1, 2), (3, 4)], [(1, 2), (3, 5)], "values", "[1]"),
    (["ab", 2], ["ab", 3], "values", ""),
    ([1.0, 2], [1.0, "2"], "type", "[1]"),
    ([*range(30)], [*range(29), 0], "values", "[29]"),
    (X, np.array(["a", "b"]), "type", ""),
    (np.arange(3.0), [0.0, 1.0, 2.0], "type", ""),
    ([1], (x for x in (1,)), "type", ""),
    ({"a": 1}, {"b": 1}, "keys", ""),
    ({"a": 1}, {"a": 2}, "values", "['a']"),
    ({"a": 1}, [1], "type", ""),
    ("ab", "ac", "values", ""),
    ("ab", b"ab", "type", ""),
    ({1}, {2}, "values", ""),
    (Pair(1, 2), Pair(1, 3), "values", "['right']"),
    (None, 0, "type", ""),
]


@pytest.mark.parametrize(("expected", "actual"), SAME, ids=range(len(SAME)))
def test_equal_values(expected, actual):
    if isinstance(expected, nn.Module):
        actual = nn.Linear(2, 2)
        assert difference(expected, actual).kind == "values"
        actual.load_state_dict(expected.state_dict())
    assert difference(expected, actual) is None


@pytest.mark.parametrize(
    ("expected", "actual", "kind", "where"), OTHER, ids=range(len(OTHER))
)
def test_other_values(expected, actual, kind, where):
    found = difference(expected, actual)
    assert (found.kind, found.where) == (kind, where)
    assert found.expected != found.actual


def test_tolerance_is_for_fractions_only():
    assert difference(1.0, 1.0 + 1e-6, atol=1e-5) is None
    assert difference(float("inf"), 0.0, rtol=1e-4) is not None
    assert difference(1.0, 1.0 + 1e-4, atol=1e-5) is not None
    assert difference(1e6, 1e6 + 1, rtol=1e-5) is None
    assert difference(1000000, 1000001, rtol=1e-5) is not None
    assert difference(torch.ones(2), torch.ones(2) + 1e-6, atol=1e-5) is None


def test_the_note_counts_and_places():
    found = difference(torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 1]]))
    assert found.note == "2 of 6 numbers differ, the first at (1, 1)"


def test_a_short_row_is_told_as_a_whole():
    found = difference([[0, 1, 2]], [[0, 2, 2]])
    assert (found.expected, found.actual) == ("[0, 1, 2]", "[0, 2, 2]")
    assert (found.where, found.note) == ("[0]", "the first that differs is [1]")


def test_an_array_is_called_one():
    found = difference(np.zeros((2, 3)), [1])
    assert found.expected == "a numpy array of shape (2, 3)"
    assert describe(np.arange(2)[::-1]) == "numpy int64 (2,)\n[1, 0]"
    assert describe([np.ones(1)]) == "numpy float64 (1,)\n[1.]"
    assert "'x'" in describe(np.array(["x"]))


def test_what_has_no_numbers_to_show_is_described_all_the_same():
    assert describe(torch.eye(2).to_sparse()) == "float32 (2, 2), sparse"
    assert describe(torch.ones(2, device="meta")) == "float32 (2,), without numbers"
    assert describe(len) == "len"


def test_large_tensors_are_described_in_outline():
    text = describe(torch.zeros(40, 50))
    assert text.startswith("float32 (40, 50)")
    assert "..." in text
    assert len(text) < 300
    assert describe(torch.ones(2, dtype=torch.bfloat16)) == "bfloat16 (2,)\n[1., 1.]"
    assert len(describe("x" * 5000)) < 410
    assert "float32 (1,)" in describe([torch.ones(1), 3])
