"""The recorder: what ran, how often, and how long it is."""

import sys

import pytest
import torch

from annotated_src import sampling
from annotated_src.figures.calls import (
    code_lines,
    code_of,
    count_lines,
    draw_map,
    map_data,
    record,
)
from annotated_src.generate import generate_stream
from annotated_src.sampler import Sample

LOGITS = torch.tensor([[0.5, 2.0, -1.0]])


def test_it_counts_calls_below_their_callers():
    sample = Sample(top_p=0.5)

    def run():
        sample.probabilities(LOGITS)
        return sample(LOGITS), sampling.greedy(LOGITS)

    found = record("annotated_src", run)
    assert found.answer[1].tolist() == [1]
    assert found.counts[("Sample.probabilities",)] == 1
    assert found.counts[("Sample.__call__", "Sample.probabilities")] == 1
    assert found.counts[("Sample.__call__", "Sample.probabilities", "top_p")] == 1
    assert found.counts[("greedy",)] == 1
    assert found.calls("Sample.probabilities") == found.calls("top_p") == 2
    names = [code.co_qualname for code in found.functions()]
    assert len(names) == len(set(names))
    assert names[0] == "Sample.probabilities"
    assert not any("<" in name for name in names)  # no lambda, no comprehension


def test_it_sees_no_other_package_and_stops_when_done():
    found = record("annotated_src", lambda: torch.nn.Linear(2, 2)(torch.zeros(1, 2)))
    assert found.counts == {}
    assert sys.getprofile() is None
    assert record("torch", lambda: torch.nn.Linear(2, 2)).calls("Linear.__init__") == 1


def test_it_stops_after_an_error_and_the_next_record_is_clean():
    def run():
        sampling.top_k(LOGITS, 0)

    with pytest.raises(ValueError, match="top_k must be at least 1"):
        record("annotated_src", run)
    assert sys.getprofile() is None
    found = record("annotated_src", lambda: sampling.greedy(LOGITS))
    assert {path[0] for path in found.counts} == {"greedy"}
    assert found.calls("greedy") == 1


@pytest.mark.usefixtures("unchecked")
def test_a_generator_counts_once_however_often_it_goes_on(make_checkpoint):
    model, tokens = make_checkpoint().model, torch.tensor([[1, 2]])
    found = record(
        "annotated_src", lambda: list(generate_stream(model, tokens, max_new_tokens=6))
    )
    assert len(found.answer) == 6
    assert found.calls("_decode") == 1
    assert found.calls("Llama.forward") == 6
    assert found.calls("LlamaBlock.forward") == 6 * 3


def three_lines(x):
    """Says nothing that counts.

    Neither does this.
    """
    # nor this

    y = x + 1
    return y


def test_lines_of_code_leave_prose_out():
    code = three_lines.__code__
    first = code.co_firstlineno
    assert {number - first for _, number in code_lines(code)} == {0, 7, 8}
    assert count_lines([code, code]) == 3


def test_symbols_are_found_or_refused():
    assert code_of("annotated_src.sampling:greedy").co_name == "greedy"
    found = code_of("transformers.generation.utils:GenerationMixin.generate")
    assert found.co_qualname == "GenerationMixin.generate"  # past its decorator
    for symbol in ("annotated_src.sampling:greed", "no.module:at_all", "torch:argmax"):
        with pytest.raises(ValueError, match=f"no function '{symbol}'"):
            code_of(symbol)


def test_the_map_has_a_bar_for_every_line_of_code():
    ours = record("annotated_src", lambda: Sample(top_p=0.5)(LOGITS))
    twin = code_of("annotated_src.sampling:top_p")
    data = map_data(ours, ours, [twin])
    assert len(data.theirs) == count_lines(ours.functions())
    assert sum(row[2] for row in data.theirs) == count_lines([twin])
    assert all(row[2] for row in data.ours)
    assert all(0 <= left < right <= 88 for left, right, _ in data.ours)
    (ax,) = draw_map(data).axes
    words = [text.get_text() for text in ax.texts]
    lines = f"{len(data.ours)} lines of code"
    assert words == [f"ours: {lines}", f"transformers: {lines}"]
    bars = sum(len(bars.get_segments()) for bars in ax.collections)
    assert bars == 2 * len(data.ours)
