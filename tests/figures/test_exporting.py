"""The numbers behind the pictures of exporting."""

import pytest
import torch

from annotated_src import edge_model
from annotated_src.figures import exporting
from annotated_src.figures.exporting import (
    GROUPS,
    OperatorsData,
    calls_data,
    draw_calls,
    draw_operators,
    operators_data,
)
from annotated_src.models.llama import Llama, tiny_config

WORDS = ["Once", "upon", "a", "time", "there", "was", "a", "small", "llama"]


@pytest.fixture
def calls():
    model = Llama(tiny_config()).eval().requires_grad_(False)
    return calls_data(model, WORDS, prompt_len=4, prefill=7, cache=10)


def test_each_call_writes_its_own_places_and_leaves_the_others_right(calls):
    places = torch.arange(10)
    assert calls.written[0].tolist() == [True] * 7 + [False] * 3
    for row, place in enumerate(range(4, 9), start=1):
        assert calls.written[row].nonzero().flatten().tolist() == [place]
    assert calls.visible.tolist() == [4, 5, 6, 7, 8, 9]
    assert torch.equal(calls.right, places < calls.visible[:, None])


def test_the_picture_says_what_is_in_each_place(calls):
    (ax,) = draw_calls(calls).axes
    said = [text.get_text() for text in ax.texts]
    assert said[:10] == [*WORDS[:4], "0", "0", "0", "99", "99", "99"]
    assert said[10:20] == [*WORDS[:5], "0", "0", "99", "99", "99"]
    assert said[50:60] == [*WORDS, "99"]
    assert [name.get_text() for name in ax.get_yticklabels()] == [
        "prefill",
        *["decode"] * 5,
    ]


def test_a_wrong_cache_would_be_seen(monkeypatch):
    """Were the keys written one place too far, none would be right."""
    write = edge_model.write_tokens
    monkeypatch.setattr(
        edge_model,
        "write_tokens",
        lambda stored, new, start: write(stored, new.roll(1, dims=2) + 1, start),
    )
    model = Llama(tiny_config()).eval().requires_grad_(False)
    assert not calls_data(model, WORDS, 4, 7, 10).right.any()


def test_operators_are_counted_by_group(monkeypatch):
    steps = {
        "prefill": ["FULLY_CONNECTED", "RESHAPE", "RESHAPE"],
        "decode": ["FULLY_CONNECTED", "MUL", "SOFTMAX", "DYNAMIC_UPDATE_SLICE"],
    }
    monkeypatch.setattr(exporting, "operators", lambda path: steps)
    data = operators_data("any.tflite")
    assert data.groups == tuple(GROUPS)
    assert data.prefill.tolist() == [1, 0, 0, 0, 2, 0]
    assert data.decode.tolist() == [1, 1, 1, 1, 0, 0]
    steps["decode"].append("CONV_2D")
    with pytest.raises(ValueError, match="operators of no group: CONV_2D"):
        operators_data("any.tflite")


def test_the_picture_says_the_counts():
    data = OperatorsData(
        tuple(GROUPS), torch.arange(6), torch.tensor([9, 8, 7, 6, 5, 41])
    )
    (ax,) = draw_operators(data).axes
    said = {text.get_text() for text in ax.texts}
    assert {"41", "9 in decode", "0 in prefill", "8", "1"} <= said
    title = "Operators in the file:\n76 for one token, 15 for many"
    assert ax.get_title("left") == title
