"""What comes out of a student's process: the same values, or an error, never code."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from annotated_src.checks.comparing import difference
from annotated_src.classroom.inside import wire

REFUSED = r"no plain data|no shape|bytes are no|base64|not enough values"
VALUES = {
    "nothing": None,
    "plain": [True, 3, -2.5, "ü\ud800", b"\x00\xff", 2 + 1j],
    "nested": {"a": (1, [2, {3: "4"}]), 5: {6, 7}, (8, 9): frozenset("x")},
    "not a number": [float("inf"), -float("inf")],
    "floats": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.float16),
    "bfloat16": torch.arange(4, dtype=torch.bfloat16).reshape(2, 2).T,
    "complex": torch.tensor([1 + 2j]).conj(),
    "bools": torch.tensor([[True], [False]]),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4, dtype=torch.int8),
    "in a list": [torch.ones(2), {"x": torch.zeros(1, dtype=torch.uint8)}],
    "array": np.arange(6.0).reshape(2, 3).T,
    "number of numpy": np.float64(0.5),
    "gradient": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_data_comes_back_as_it_was(name):
    value = VALUES[name]
    back = wire.value_of(json.loads(json.dumps(wire.plain(value))))
    assert difference(value, back) is None
    assert not isinstance(back, torch.nn.Parameter)
    assert isinstance(back, np.ndarray) == isinstance(value, np.ndarray)


def test_what_is_no_plain_data_is_only_named():
    for value in (torch.nn.Linear(1, 1), print, object(), io.StringIO()):
        back = wire.value_of(wire.plain(value))
        assert repr(back) == f"an object of type {type(value).__name__}"
    sparse = wire.value_of(wire.plain(torch.eye(2).to_sparse()))
    assert "sparse" in repr(sparse)


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        {},
        {"list": 3},
        {"list": [1], "tuple": [2]},
        {"eval": ["1"]},
        {"bytes": "no base 64"},
        {"complex": ["1", "2"]},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"set": [{"list": []}]},
        {"tensor": ["float32", [2], "AAAA"]},
        {"tensor": ["float32", [-1], ""]},
        {"tensor": ["float32", [True], "AAAAAA=="]},
        {"tensor": ["object", [0], ""]},
        {"tensor": ["float32", [2**62, 0], "AAAA"]},
        {"tensor": "float32"},
        {"array": ["bfloat16", [1], "AAA="]},
    ],
)
def test_what_nobody_writes_is_refused(tree):
    with pytest.raises(ValueError, match=REFUSED):
        wire.value_of(tree)


def test_depth_and_size_have_an_end():
    deep = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 30"):
        wire.plain(deep)
    tree = None
    for _ in range(40):
        tree = {"list": [tree]}
    with pytest.raises(ValueError, match="no plain data"):
        wire.value_of(tree)
    with pytest.raises(ValueError, match="too large"):
        wire.plain(torch.zeros(1).expand(10**10))
    with pytest.raises(ValueError, match="nested too deeply"):
        wire.loads(b"[" * 10**5)
    with pytest.raises(ValueError, match="a message of"):
        wire.read_frame(io.BytesIO((2**40).to_bytes(8, "big")))
    with pytest.raises(EOFError, match="inside a message"):
        wire.read_frame(io.BytesIO((9).to_bytes(8, "big") + b"short"))


def test_a_pickle_is_no_message():
    with pytest.raises(ValueError, match=r"utf-8|JSON|Expecting|decode"):
        wire.loads(pickle.dumps({"kind": "called"}))
