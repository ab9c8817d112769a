"""The numbers behind the pictures of quantisation."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from annotated_src.figures.quantizing import (
    KINDS,
    SETTINGS,
    crest,
    crest_data,
    decibels,
    draw_crest,
    draw_frontier,
    draw_row,
    frontier_data,
    row_data,
)
from annotated_src.grading import grade
from annotated_src.models.llama import Llama, tiny_config
from annotated_src.quantize import quantize_, weight_bytes

SMALL = (
    ("int8", "weights only", (("int8-weight-only", None, None),)),
    ("int4", "groups of 8", (("int4-grouped", None, 8),)),
    ("int4", "whole rows", (("int4-grouped", "down", 80), ("int4-grouped", "up", 48))),
)


@pytest.fixture
def model():
    return Llama(replace(tiny_config(), tied_head=True)).eval()


def said(figure):
    return {text.get_text() for ax in figure.axes for text in ax.texts}


def test_decibels_and_crest_by_hand():
    signal = torch.tensor([3.0, -4.0, 0.0, 0.0])
    assert crest(signal[None]).item() == pytest.approx(4 / 2.5)
    assert decibels(signal, signal + 0.25) == pytest.approx(20.0)
    assert decibels(signal, signal * 0.9) == pytest.approx(20.0)


def test_row_with_an_outlier():
    row = torch.randn(128)
    row[40] = -60.0
    data = row_data(row, group_size=32)
    step = 60 / 7.5
    assert data.steps[1].unique().tolist() == [pytest.approx(step)]
    assert data.zeros[1].item() == 127 / 128
    assert data.zeros[2].item() < 0.5
    assert data.decibels[0] > data.decibels[1]
    assert len(data.steps[2].unique()) == 4
    assert (data.rounded - row).abs().le(data.steps * 0.5001).all()
    figure = draw_row(data, first=16, count=64)
    assert "one weight of −60.00" in said(figure)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[1] == f"{KINDS[1]}: 99.2% of the row becomes 0"
    # Each stretch of columns has 2^bits levels, -8 to 7 of its own steps.
    levels = [
        [
            drawn.get_segments()
            for drawn in ax.collections
            if hasattr(drawn, "get_segments")
        ]
        for ax in figure.axes
    ]
    counts = [[len(stretch) for stretch in drawn] for drawn in levels]
    assert [set(count) for count in counts] == [{256}, {16}, {16}]
    assert len(counts[2]) == 3  # columns 16 to 79 lie in three groups of 32
    heights = [line[0, 1] for line in levels[1][0]]
    assert (min(heights), max(heights)) == pytest.approx((-8 * step, 7 * step))


def test_the_arrow_is_there_only_where_the_outlier_is():
    data = row_data(torch.randn(128))
    top = int(data.weight.abs().argmax())
    assert not said(draw_row(data, first=64 if top < 64 else 0, count=64))


def test_crests_are_those_of_rows_and_of_inputs(model):
    tokens = torch.randint(96, (2, 5))
    data = crest_data(model, tokens)
    linears = [p for p in model.blocks.modules() if isinstance(p, nn.Linear)]
    assert len(data.weights) == sum(part.out_features for part in linears)
    # q, k, v share an input, and so do gate and up.
    assert len(data.tokens) == 2 * 4 * 10
    assert all(not part._forward_pre_hooks for part in linears)
    first = model.blocks[0].attention_norm(model.embedding(tokens))
    found = crest(first).flatten()
    assert torch.equal(data.tokens[:10], found)
    texts = " ".join(said(draw_crest(data)))
    assert f"median {data.tokens.median():.1f}" in texts
    noise = 20 * math.log10(127.5 * 12**0.5 / data.weights.median())
    assert f"{noise:.0f} dB" in texts


def test_frontier_grades_copies_and_leaves_the_model_alone(model):
    tokens = torch.randint(96, (1, 12))
    before, full = model(tokens), weight_bytes(model)
    data = frontier_data(model, tokens, SMALL)
    assert torch.equal(model(tokens), before)
    quantize_(model, "int8-weight-only")
    first = data.points[0]
    assert first.megabytes == weight_bytes(model) / 1e6
    assert first.grades == grade(before, model(tokens))
    norms = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n)
    assert data.kept == pytest.approx((96 * 48 * 4 + norms) / 1e6)
    assert data.full == full / 1e6
    # Drawn where those of SmolLM2 are.
    places = ((220, 0.003), (219, 0.23), (167, 0.8))
    points = [
        point._replace(megabytes=size, grades=point.grades._replace(mean_kl=price))
        for point, (size, price) in zip(data.points, places, strict=True)
    ]
    names = said(draw_frontier(data._replace(points=points, kept=113)))
    assert {"int8, weights only", "int4, groups of 8", "whole rows"} <= names


def test_each_setting_quantises_all_of_smollm2_s_blocks():
    from annotated_src.figures.cache import SMOLLM2

    for _, _, calls in SETTINGS:
        with torch.device("meta"):
            model = Llama(replace(SMOLLM2, num_layers=1))
        for call in calls:
            quantize_(model, *call)
        assert not any(type(part) is nn.Linear for part in model.modules())
