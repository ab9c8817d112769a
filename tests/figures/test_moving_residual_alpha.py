import math

import pytest
import torch

from annotated_src.figures.block import DIM, random_blocks, sublayers_of
from annotated_src.figures.moving.residual_alpha import residual_alpha_data
from annotated_src.masks import prefix_mask
from annotated_src.rotary_2d import rotation


@pytest.fixture(scope="module")
def data():
    return residual_alpha_data()


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    blocks = random_blocks(28)
    return blocks, torch.randn(1, 32, DIM)


def test_with_the_root_the_models_own_blocks_make_that_stream(data, stack):
    blocks, x = stack
    row = torch.arange(32)
    rotate = rotation(torch.stack((row, row.flip(0)))[None], DIM // 4, torch.float32)
    mask = prefix_mask(torch.tensor([16]), 32)
    sizes = [x.square().mean().sqrt().item()]
    with torch.no_grad():
        for block in blocks:
            x = block(x, rotate, mask)
            sizes.append(x.square().mean().sqrt().item())
    assert data["alphas"][data["root"]] == round(math.sqrt(56), 2)
    at_root = data["chatglm"][data["root"]]["stream"]
    assert sizes == pytest.approx(at_root, abs=0.006)


def test_the_inputs_share_is_what_the_norms_leave_of_it(data, stack):
    """Follow the input alone: each norm divides it, each residual enlarges it."""
    blocks, x = stack
    for alpha, measured in zip(data["alphas"], data["chatglm"], strict=True):
        stream, part = x, x
        with torch.no_grad():
            for norm, branch in sublayers_of(blocks):
                spread = stream.std(dim=-1, correction=0, keepdim=True)
                part = alpha * (part - part.mean(dim=-1, keepdim=True)) / spread
                stream = alpha * norm(stream) + branch(norm(stream))
        share = (part * stream).sum() / stream.square().sum()
        assert measured["shares"][0] == pytest.approx(share.item(), abs=0.003)


def test_the_parts_make_the_whole_and_alpha_shifts_them_to_the_input(data):
    for measured in (*data["chatglm"], data["llama"]):
        assert len(measured["stream"]) == len(measured["shares"]) == 29
        assert sum(measured["shares"]) == pytest.approx(1, abs=29 * 5e-5)
    inputs = [measured["shares"][0] for measured in data["chatglm"]]
    assert inputs == sorted(inputs)
    assert data["alphas"] == sorted(data["alphas"])


def test_prenorm_grows_and_leaves_everybody_a_little(data):
    stream, shares = data["llama"]["stream"], data["llama"]["shares"]
    assert stream[::4] == sorted(stream[::4])
    assert stream[-1] > 5
    assert max(shares) < 0.1
