"""The fast path: the same model, its weights rounded and its products in bfloat16."""

import copy
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from annotated_src.chatglm_quantize import dequantize_rows, quantize_rows
from annotated_src.checkpoint import load_model
from annotated_src.fast import FEW, Int8Linear, speed_up
from annotated_src.generate import generate
from annotated_src.quantize import weight_bytes
from annotated_src.tokenizer import load_tokenizer

KINDS = {
    "grouped": {},
    "multi-head": {"num_kv_heads": 6},
    "multi-query tied": {"num_kv_heads": 1, "tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope": "llama3", "tied": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request, make_checkpoint):
    return make_checkpoint(**request.param).model


def rounded(weight):
    """What the integers and scales of a weight stand for."""
    return dequantize_rows(*quantize_rows(weight, 8), 8, torch.float32)


def with_rounded_weights(model):
    """The plain model with the weights that the fast one has."""
    model = copy.deepcopy(model)
    head = model.embedding if model.config.tied_head else model.lm_head
    rounded_head = rounded(head.weight.detach())
    model.score = lambda x: F.linear(x, rounded_head)
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = rounded(layer.weight.detach())
    return model


def assert_within(found, expected, error):
    """Compare by the norm: how long the difference is beside the thing itself."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < error * expected.norm()


# One product


@pytest.mark.parametrize("num_tokens", [1, 4, FEW, FEW + 1, 40])
@pytest.mark.parametrize("cols", [1, 10, 16, 24, 33, 48])  # of 16 and not
def test_a_product_is_that_of_the_weights_it_stands_for(cols, num_tokens):
    layer = nn.Linear(cols, 30, bias=False)
    x = torch.randn(1, num_tokens, cols)
    weight = rounded(layer.weight.detach()).double()
    expected = (x.bfloat16().double() @ weight.T).float()
    # bfloat16 keeps 8 bits: rounded to it, no sum is off by more than 2**-8 of itself.
    assert_within(Int8Linear(layer)(x), expected, 2**-8)


def test_rounding_the_scales_as_the_kernel_does_would_be_worse():
    layer, x = nn.Linear(64, 512, bias=False), torch.randn(1, 8, 64)
    integers, scale = quantize_rows(layer.weight.detach(), 8)
    expected = x.bfloat16().float() @ rounded(layer.weight.detach()).T
    kernel = torch._weight_int8pack_mm(x[0].bfloat16(), integers, scale.bfloat16())
    ours = (Int8Linear(layer)(x) - expected).norm()
    assert 1.2 * ours < (kernel.float()[None] - expected).norm()


def test_layers_that_share_an_input_are_one_product():
    layers = [nn.Linear(32, rows) for rows in (8, 3, 5)]
    x = torch.randn(2, 3, 32)
    apart = torch.cat([Int8Linear(layer)(x) for layer in layers], dim=-1)
    assert_within(Int8Linear(*layers)(x), apart, 1e-6)
    biases = torch.cat([layer.bias.detach() for layer in layers])
    for layer in layers:
        layer.bias = None
    torch.testing.assert_close(Int8Linear(*layers)(x) + biases, apart)


def test_a_weight_stored_by_columns_gives_the_same():
    layer, x = nn.Linear(32, 16), torch.randn(1, 2, 32)
    expected = Int8Linear(layer)(x)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    assert torch.equal(Int8Linear(layer)(x), expected)


# The model


@pytest.mark.parametrize("num_tokens", [3, 30])
def test_scores_are_those_of_a_plain_model_with_these_weights(model, num_tokens):
    tokens = torch.randint(0, 97, (2, num_tokens))
    found = speed_up(model)(tokens)
    assert_within(found, with_rounded_weights(model)(tokens).detach(), 0.02)
    assert not found.requires_grad


def test_one_token_at_a_time_is_as_good_as_all_at_once(model):
    fast, tokens = speed_up(model), torch.randint(0, 97, (2, 24))
    cache = fast.new_cache(2, 24)
    steps = [fast(tokens[:, i : i + 1], cache) for i in range(24)]
    assert_within(torch.cat(steps, dim=1), fast(tokens), 0.02)
    last = fast(tokens, last_logits_only=True)
    assert_within(last, fast(tokens)[:, -1:], 0.02)


def test_a_padded_row_is_scored_as_it_is_alone(make_checkpoint):
    fast = speed_up(make_checkpoint().model)
    tokens = torch.randint(0, 97, (2, 9))
    is_token = torch.arange(9) >= torch.tensor([[4], [0]])
    found = fast(tokens, is_token=is_token)
    assert_within(found[:1, 4:], fast(tokens[:1, 4:]), 0.02)
    assert_within(found[1:], fast(tokens[1:]), 0.02)


def test_generate_takes_it(make_checkpoint):
    fast, tokens = speed_up(make_checkpoint().model), torch.randint(0, 97, (1, 5))
    cache = fast.new_cache(1, 17)
    expected, step = tokens, tokens
    for _ in range(12):
        step = fast(step, cache)[:, -1:].argmax(-1)
        expected = torch.cat((expected, step), dim=1)
    assert torch.equal(generate(fast, tokens, max_new_tokens=12), expected)


def test_the_model_stays_as_it_is(make_checkpoint):
    model, tokens = make_checkpoint().model, torch.randint(0, 97, (1, 6))
    before, weights = model(tokens), copy.deepcopy(model.state_dict())
    fast = speed_up(model)
    fast(tokens)
    assert torch.equal(model(tokens), before)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert model.embedding.weight.requires_grad
    assert fast.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert not any(p.requires_grad for p in fast.parameters())


# What is refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_refused(make_checkpoint, dtype):
    model = copy.deepcopy(make_checkpoint().model).to(dtype)
    with pytest.raises(ValueError, match=f"embedding.weight is {dtype} on cpu"):
        speed_up(model)


def test_another_device_is_refused(make_checkpoint):
    with pytest.raises(ValueError, match="float32 on meta"):
        speed_up(copy.deepcopy(make_checkpoint().model).to("meta"))


def test_a_fast_model_and_another_model_are_refused(make_checkpoint, unchecked):
    fast = speed_up(make_checkpoint().model)
    with pytest.raises(ValueError, match="only a Llama can be sped up, got FastLlama"):
        speed_up(fast)
    with pytest.raises(ValueError, match="got Linear"):
        speed_up(nn.Linear(2, 2))


def test_weights_that_are_not_finite_are_refused(make_checkpoint):
    model = copy.deepcopy(make_checkpoint().model)
    model.blocks[1].ffn.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        speed_up(model)


# The real model: what it costs


@pytest.fixture(scope="module")
def real(smollm2_dir):
    """The plain model, the fast one, and 384 tokens of real text."""
    model = load_model(smollm2_dir)
    ids = load_tokenizer(smollm2_dir).encode(topics["for"] + topics["class"])
    return model, speed_up(model), torch.as_tensor(ids).flatten()[None, :384]


def compare(found, expected, tokens):
    """Agreement on the best token, mean KL divergence, ratio of perplexities."""
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    losses = [
        F.cross_entropy(scores[0, :-1], tokens[0, 1:]) for scores in (found, expected)
    ]
    return agree.item(), divergence.item(), (losses[0] - losses[1]).exp().item()


@torch.inference_mode()
def test_the_real_model_hardly_changes(real):
    model, fast, tokens = real
    expected = model(tokens)
    cache = fast.new_cache(*tokens.shape)
    steps = [fast(part, cache) for part in tokens.split(4, dim=1)]  # the kernel
    for found in (torch.cat(steps, dim=1), fast(tokens)):
        agree, divergence, ratio = compare(found, expected, tokens)
        assert agree > 0.92
        assert divergence < 0.015
        assert 0.98 < ratio < 1.02


def test_the_real_model_takes_less_than_half_of_the_memory(real):
    model, fast, _ = real
    assert weight_bytes(fast) < 0.48 * weight_bytes(model)
