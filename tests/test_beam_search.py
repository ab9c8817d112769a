"""Equality with transformers is in test_generate.py, with ChatGLM in test_golden.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from annotated_src.beam_search import Beams, beam_search

STOP = 0


def logits(*shares):
    """Scores whose softmax is what is given."""
    return torch.tensor(shares).log()


def test_a_score_counts_by_the_length_before_its_stop():
    beams = Beams(torch.tensor([[5, 6, 7], [5, 6, 7]]), length_penalty=2.0)
    shares = [0.5, 0.3, 0.15, 0.05]
    rows = beams.grow(logits(shares, shares), [STOP])
    ((score, answer),) = beams.ended
    assert score == pytest.approx(math.log(0.5) / 3**2)
    assert answer.tolist() == [5, 6, 7, STOP]
    assert rows.tolist() == [0, 0]  # beam 1 was a copy and does not count
    assert beams.tokens.tolist() == [[5, 6, 7, 1], [5, 6, 7, 2]]
    # What did not end counts by its length with the last token: -1.20 / 16 is more than
    # -0.69 / 9.
    assert beams.best().tolist() == [[5, 6, 7, 1]]


def test_a_stop_behind_the_first_beams_does_not_end():
    beams = Beams(torch.tensor([[5], [5]]), length_penalty=0.0)
    shares = [0.1, 0.4, 0.3, 0.2]  # the stop is fourth of four
    beams.grow(logits(shares, shares), [STOP])
    assert beams.ended == []
    assert beams.tokens.tolist() == [[5, 1], [5, 2]]


class Decided:
    """The stop is all but certain, whatever came before."""

    def __init__(self):
        self.calls = 0

    def new_cache(self, batch_size, max_seq_len):
        return [SimpleNamespace(reorder=lambda rows: None)]

    def __call__(self, tokens, cache):
        self.calls += 1
        return logits([0.98, 0.01, 0.01])[None].expand(len(tokens), tokens.shape[1], 3)


def test_it_ends_when_no_beam_can_win():
    model = Decided()
    options = {"num_beams": 1, "max_new_tokens": 9, "stop_ids": [STOP]}
    found = beam_search(model, torch.tensor([[2, 1]]), **options)
    assert found.tolist() == [[2, 1, STOP]]
    assert model.calls == 1
