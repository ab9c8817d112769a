import math

import pytest
import torch
from torch import nn

from annotated_src.figures.block import (
    CASES,
    CHATGLM,
    COLUMNS,
    POST_NORM,
    PRE_NORM,
    column_parts,
    depth_data,
    draw_depth,
    draw_steps,
    draw_wiring,
    follow,
    in_parts,
    measure,
    random_blocks,
    sublayers_of,
)
from annotated_src.figures.norm_placement import post_norm
from annotated_src.figures.norm_placement import random_blocks as llama_blocks
from annotated_src.masks import causal_mask, prefix_mask
from annotated_src.models.chatglm import ALPHA
from annotated_src.rotary_2d import rotation

PRE, ONE, FOURTH, ROOT = range(4)


@pytest.fixture(scope="module")
def depth():
    return depth_data(num_layers=28, depths=(2, 8, 28), num_seeds=1)


def test_the_first_two_wirings_are_the_models_blocks():
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 6, 64)
    (block,) = random_blocks(1)
    row = torch.arange(6)
    rotate = rotation(torch.stack((row, row.flip(0)))[None], 16, x.dtype)
    found = follow(CHATGLM, x, sublayers_of([block], 6), ALPHA)
    expected = block(x, rotate, prefix_mask(torch.tensor([3]), 6))
    torch.testing.assert_close(found[-1], expected)
    assert len(found) == 3

    (llama,) = llama_blocks(1)
    mask = causal_mask(6)
    halves = [
        (llama.attention_norm, lambda n: llama.attention(n, nn.Identity(), mask)),
        (llama.ffn_norm, llama.ffn),
    ]
    found = follow(PRE_NORM, x, halves, 1.0)[-1]
    torch.testing.assert_close(found, llama(x, nn.Identity(), mask))
    found = follow(POST_NORM, x, halves, 1.0)[-1]
    torch.testing.assert_close(found, post_norm(llama, x, nn.Identity(), mask))


def test_llamas_norms_stand_aside_and_chatglms_on_the_stream():
    llama, filed, _ = map(column_parts, COLUMNS)
    assert [p.aside for p in llama if p.step == "norm"] == [True, True, False]
    assert [p.aside for p in filed if p.step == "norm"] == [False] * 3
    assert all(p.aside for p in (*llama, *filed) if p.step == "branch")
    assert not any(p.aside for p in (*llama, *filed) if p.step in ("fork", "add"))


def test_the_two_pictures_of_chatglm_differ_in_the_frame_alone():
    _, filed, cut = COLUMNS
    assert column_parts(filed) == column_parts(cut)
    steps = [part.step for part in column_parts(filed)]
    assert len(steps) == 9
    for column in (filed, cut):
        first, last = column.frame
        assert tuple(steps[first : last + 1]) == column.wiring.steps * 2


def test_the_parts_add_up_to_the_stream():
    torch.manual_seed(1)
    sublayers = sublayers_of(random_blocks(2), 8)
    x = torch.randn(1, 8, 64)
    for case in CASES:
        start = torch.cat((x[None], torch.zeros(4, 1, 8, 64)))
        whole = follow(case.wiring, x, sublayers, 2.0)
        parts = follow(case.wiring, start, in_parts(sublayers, 5), 2.0)
        for stream, split in zip(whole, parts, strict=True):
            torch.testing.assert_close(split.sum(0), stream, rtol=1e-4, atol=1e-4)
        assert (parts[1][2:] == 0).all()
        assert (parts[-1][4] != 0).any()


def test_the_stream_keeps_the_size_of_alpha_or_grows(depth):
    assert ((depth.stream[ROOT, 1:] - math.sqrt(56)).abs() < 0.1).all()
    assert ((depth.stream[FOURTH, 1:] - 56**0.25).abs() < 0.2).all()
    assert ((depth.stream[ONE, 1:] - 1.2).abs() < 0.2).all()
    assert (depth.stream[PRE].diff()[:4] > 0).all()
    assert 5 < depth.stream[PRE, -1] < 6.5


def test_shares_grow_to_one_and_alpha_keeps_the_embedding(depth):
    torch.testing.assert_close(depth.there[:, -1], torch.ones(4), rtol=0, atol=1e-4)
    assert depth.there.shape == (4, 57)
    assert 0.7 < depth.there[ROOT, 0] < 0.85
    assert 0.02 < depth.there[PRE, 0] < 0.05
    assert 0.03 < depth.there[FOURTH, 0] < 0.09
    assert depth.there[ONE, 45].abs() < 0.05
    assert depth.there[ONE, -5] < 0.2


def test_one_step_changes_a_deep_stack_wholly_unless_alpha_grows_with_it(depth):
    two, eight, all_28 = depth.changes.T
    assert two.max() < 0.2
    assert eight[ONE] > 0.8
    assert eight[ROOT] < 0.2
    assert (all_28[:3] > 0.8).all()
    assert all_28[ROOT] < 0.35


def test_a_step_goes_against_the_gradient():
    found = measure(CASES[ROOT], num_layers=2)
    again = measure(CASES[ROOT], num_layers=2)
    assert found.change == again.change
    assert 0.01 < found.change < 0.1
    assert found.stream[0] == pytest.approx(1, abs=0.05)


def test_figures_draw(depth):
    for figure in (draw_wiring(), draw_depth(depth), draw_steps(depth)):
        assert figure._repr_png_().startswith(b"\x89PNG")
