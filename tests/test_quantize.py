"""int8 and int4 for any model: integers, layers, the swap; torchao beside it."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from annotated_src.checkpoint import lay_by_columns
from annotated_src.generate import generate
from annotated_src.models import gemma, llama, phi
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds
from annotated_src.quantize import (
    SCHEMES,
    DynamicLinear,
    WeightOnlyLinear,
    dequantize_groups,
    pack_int4,
    quantize_,
    quantize_groups,
    unpack_int4,
    weight_bytes,
)

BITS = (8, 4)
CHATGLM = ChatGLMConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=48,
    num_heads=4,
    ffn_dim=80,
    max_seq_len=128,
    norm_eps=1e-5,
    blank_ids=BlankIds(sop=90, gmask=91, mask=92),
    tied_head=False,
)
MODELS = {
    "llama": lambda: llama.Llama(llama.tiny_config()),
    "llama-tied": lambda: llama.Llama(replace(llama.tiny_config(), tied_head=True)),
    "gemma": lambda: gemma.Gemma(gemma.tiny_config()),
    "phi": lambda: phi.Phi(phi.tiny_config()),
    "chatglm": lambda: ChatGLM(CHATGLM),
}
each_bits = pytest.mark.parametrize("bits", BITS)
each_model = pytest.mark.parametrize("name", MODELS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def options(scheme):
    """Groups that divide all sizes of the small models."""
    return {"group_size": 8} if scheme == "int4-grouped" else {}


def small(name):
    """Weights large enough to matter, by columns, as load_model leaves them."""
    model = MODELS[name]().eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(std=0.2)
    lay_by_columns(model)
    return model


def linears_of(module):
    return {n: part for n, part in module.named_modules() if type(part) is nn.Linear}


def tokens_for(name, rows=1):
    tokens = torch.randint(80, (rows, 9))
    if name == "chatglm":
        tokens[:, -2:] = torch.tensor([91, 90])  # [gMASK], then the answer begins
    return tokens


def by_loops(weight, bits, group_size):
    """One weight after the other, in Python, in float64."""
    half, integers, scales = 2 ** (bits - 1), [], []
    for row in weight.tolist():
        groups = [row[i : i + group_size] for i in range(0, len(row), group_size)]
        scales.append([max(map(abs, group)) / (half - 0.5) for group in groups])
        integers.append(
            [
                min(max(round(w / scale) if scale else 0, -half), half - 1)
                for group, scale in zip(groups, scales[-1], strict=True)
                for w in group
            ]
        )
    return integers, scales


# The integers


@each_bits
@pytest.mark.parametrize("group_size", [1, 4, 24])
def test_groups_are_rounded_one_weight_after_the_other(bits, group_size):
    weight = torch.randn(6, 24) * torch.rand(6, 1)
    weight[3, :4] = 0
    integers, scale = quantize_groups(weight, bits, group_size)
    expected, scales = map(torch.tensor, by_loops(weight, bits, group_size))
    # A group's largest weight is half-way between two integers: it may go to either.
    largest = scales.repeat_interleave(group_size, dim=1) * (2 ** (bits - 1) - 0.5)
    half_way = torch.isclose(weight.abs(), largest) & (largest > 0)
    assert torch.equal(integers[~half_way].long(), expected[~half_way])
    assert ((integers - expected).abs() <= half_way).all()
    positive = scales > 0
    torch.testing.assert_close(scale[positive], scales[positive])
    assert scale.dtype == torch.float32


@each_bits
@given(st.data())
def test_no_weight_moves_by_more_than_half_its_scale(bits, data):
    size = data.draw(st.sampled_from([2, 6, 32]))
    exponent = data.draw(st.integers(-30, 30))
    value = st.floats(-1, 1, width=32)
    values = data.draw(st.lists(value, min_size=3 * size, max_size=3 * size))
    weight = torch.tensor(values).view(1, -1) * 2.0**exponent
    integers, scale = quantize_groups(weight, bits, size)
    moved = (dequantize_groups(integers, scale) - weight).abs()
    bound = scale.repeat_interleave(size, dim=1) / 2
    assert (moved <= bound * (1 + 1e-4)).all()  # the quotient is rounded as well
    limit = 2 ** (bits - 1)
    assert ((integers.int() >= -limit) & (integers.int() < limit)).all()


@each_bits
def test_the_largest_weight_is_half_a_step_away(bits):
    limit = 2 ** (bits - 1)
    weight = torch.linspace(-1, 1, 1002)[None]
    integers, scale = quantize_groups(weight, bits, 1002)
    assert scale.item() == pytest.approx(1 / (limit - 0.5))
    assert set(range(1 - limit, limit)) <= set(integers.unique().tolist())
    moved = dequantize_groups(integers, scale)[0, [0, -1]] - weight[0, [0, -1]]
    assert moved.abs().tolist() == pytest.approx([scale.item() / 2] * 2, rel=1e-3)


@each_bits
def test_zeros_and_the_smallest_weights(bits):
    weight = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [3e38, 1e38]])
    integers, scale = quantize_groups(weight, bits, 2)
    found = dequantize_groups(integers, scale)
    assert found.isfinite().all()
    assert not integers[0].any()
    assert ((found - weight).abs() <= scale * (0.5 + 1e-4)).all()


@each_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_in_float32(bits, dtype):
    weight = torch.randn(4, 16).to(dtype)
    found = quantize_groups(weight, bits, 8)
    expected = quantize_groups(weight.float(), bits, 8)
    assert all(map(torch.equal, found, expected))


def test_two_integers_share_a_byte_the_even_column_below():
    packed = pack_int4(torch.tensor([[1, -1, -8, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x78]]


def test_packing_is_undone_for_every_byte():
    packed = torch.arange(256, dtype=torch.uint8)[None]
    integers = unpack_int4(packed)
    signed = [n - 16 if n > 7 else n for n in range(16)]
    assert integers[0, ::2].tolist() == signed * 16
    assert integers[0, 1::2].tolist() == [n for n in signed for _ in range(16)]
    assert torch.equal(pack_int4(integers), packed)


@pytest.mark.parametrize(
    ("bits", "group_size", "words"),
    [
        (5, 4, "bits must be 4 or 8, got 5"),
        (8, 5, "group_size 5 must divide 12 columns"),
        (8, 0, "group_size 0 must divide"),
        (4, -4, "group_size -4 must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(bits, group_size, words):
    with pytest.raises(ValueError, match=words):
        quantize_groups(torch.randn(2, 12), bits, group_size)


def test_an_odd_number_of_columns_does_not_fit_into_bytes():
    with pytest.raises(ValueError, match="4 bits need an even number of columns"):
        quantize_groups(torch.randn(2, 9), 4, 3)
    assert quantize_groups(torch.randn(2, 9), 8, 3)[0].shape == (2, 9)


# The layers


@each_bits
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_only_is_a_linear_layer_of_the_rounded_weight(bits, bias, dtype):
    linear = nn.Linear(64, 24, bias).to(dtype)
    layer, x = WeightOnlyLinear(linear, bits, 32), torch.randn(2, 3, 64, dtype=dtype)
    stored = quantize_groups(linear.weight, bits, 32)
    linear.weight.data = dequantize_groups(*stored).to(dtype)
    assert torch.equal(layer(x), linear(x))
    assert layer.bias is linear.bias


def test_gradients_pass_a_weight_only_layer_to_its_input():
    layer = WeightOnlyLinear(nn.Linear(8, 4), 8, 8)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    weight = dequantize_groups(layer.integers, layer.scale)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))


@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_products_are_those_of_a_loop_over_python_s_integers(bias):
    linear = nn.Linear(10, 7, bias)
    layer, x = DynamicLinear(linear), torch.randn(4, 10) * torch.rand(4, 1)
    tokens, token_scale = quantize_groups(x, 8, 10)
    rows = layer.integers.tolist()
    sums = [
        [sum(a * b for a, b in zip(token, row, strict=True)) for row in rows]
        for token in tokens.tolist()
    ]
    expected = torch.tensor(sums) * token_scale * layer.scale[:, 0]
    if bias:
        expected = expected + linear.bias
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(linear(x), expected, atol=1e-5)


def test_dynamic_sums_do_not_overflow_where_products_are_largest():
    linear = nn.Linear(4096, 2, bias=False)
    layer = DynamicLinear(linear)
    layer.integers.fill_(-128)
    x = -torch.ones(1, 4096)
    tokens, token_scale = quantize_groups(x, 8, 4096)
    expected = 4096 * 128 * -tokens[0, 0].item() * token_scale * layer.scale.T
    torch.testing.assert_close(layer(x), expected)


def test_a_token_s_scale_is_its_own():
    layer, x = DynamicLinear(nn.Linear(16, 8)), torch.randn(5, 16)
    shouting = x.clone()
    shouting[0] *= 1000
    assert torch.equal(layer(shouting)[1:], layer(x)[1:])
    assert torch.equal(layer(x[None, 2:3])[0], layer(x)[2:3])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_does_not_come_out_finite(bad):
    layer, x = DynamicLinear(nn.Linear(16, 8)), torch.randn(3, 16)
    x[1, 4] = bad
    found = layer(x)
    assert found.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not found[1].isfinite().any()


@each_bits
@pytest.mark.parametrize("group_size", [8, 32, 96])
def test_bytes_are_bits_and_four_for_each_scale(bits, group_size):
    layer = WeightOnlyLinear(nn.Linear(96, 40, bias=False), bits, group_size)
    assert weight_bytes(layer) == 96 * 40 * bits // 8 + 40 * (96 // group_size) * 4


# The swap


@each_model
@pytest.mark.parametrize("scheme", ["int8-weight-only", "int4-grouped"])
def test_a_weight_only_model_is_the_model_of_the_rounded_weights(name, scheme):
    model = small(name)
    rounded = copy.deepcopy(model)
    for linear in linears_of(rounded).values():
        size = 8 if scheme == "int4-grouped" else linear.in_features
        bits = 4 if scheme == "int4-grouped" else 8
        linear.weight.data = dequantize_groups(
            *quantize_groups(linear.weight, bits, size)
        )
    tokens = tokens_for(name)
    before = model(tokens)
    names = quantize_(model, scheme, **options(scheme))
    assert names == list(linears_of(rounded))
    assert not linears_of(model)
    found, expected = model(tokens), rounded(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


@each_model
@each_scheme
def test_heads_are_swapped_and_embeddings_are_not(name, scheme):
    model = small(name)
    has_head = "lm_head" in dict(model.named_modules())
    assert has_head == (name in ("llama", "phi", "chatglm"))
    names = quantize_(model, scheme, **options(scheme))
    assert ("lm_head" in names) == has_head
    assert isinstance(model.embedding, nn.Embedding)
    assert len(names) == len(model.blocks) * (len(names) // len(model.blocks)) + (
        1 if has_head else 0
    )


@each_model
@each_scheme
def test_caches_and_generate_work(name, scheme):
    model, tokens = small(name), tokens_for(name)
    quantize_(model, scheme, **options(scheme))
    text = generate(model, tokens, max_new_tokens=12)
    assert text.shape == (1, 21)
    whole = model(text[:, :-1])[:, 8:]
    cache, steps = model.new_cache(1, 20), [tokens, *text[:, 9:-1].split(1, dim=1)]
    logits = torch.cat([model(step, cache)[:, -1:] for step in steps], dim=1)
    # A rounding error may push an activation over the edge of a step, in some layer.
    apart = (logits - whole).abs().max() / whole.std()
    assert apart < (0.2 if scheme == "int8-dynamic" else 1e-4)
    if scheme != "int8-dynamic":
        assert torch.equal(whole.argmax(-1), text[:, 9:])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "phi"])
@each_scheme
def test_a_padded_row_is_as_it_is_alone(name, scheme):
    model, tokens = small(name), torch.randint(80, (1, 9))
    quantize_(model, scheme, **options(scheme))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], dim=1)
    found = model(padded, is_token=torch.arange(13)[None] >= 4)[:, 4:]
    expected = model(tokens)
    apart = (found - expected).abs().max() / expected.std()
    assert apart < (0.2 if scheme == "int8-dynamic" else 1e-4)


@each_scheme
def test_match_chooses_by_name_and_another_call_takes_the_rest(scheme):
    model = small("llama")
    feed_forward = quantize_(model, "int8-weight-only", match=r"\.ffn\.")
    assert len(feed_forward) == 2 * 3
    assert all(".ffn." in name for name in feed_forward)
    assert len(linears_of(model)) == 2 * 4 + 1
    rest = quantize_(model, scheme, match="attention|^lm_head$", **options(scheme))
    assert len(rest) == 2 * 4 + 1
    assert not linears_of(model)


def test_groups_are_32_if_not_said():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    quantize_(model, "int4-grouped", match="0")
    assert model[0].scale.shape == (8, 2)
    quantize_(model, "int4-grouped", match="1", group_size=4)
    assert model[1].scale.shape == (8, 2)


REFUSED = {
    "scheme": (("int3",), {}, "scheme must be one of .*int4-grouped.*got 'int3'"),
    "no match": (("int8-dynamic", "mlp"), {}, "no linear layer .* matches 'mlp'"),
    "no regex": (("int8-dynamic", "(ffn"), {}, r"match '\(ffn' is no regular exp"),
    "no linear": (("int8-dynamic", "norm"), {}, "no linear layer"),
    "group": (("int4-grouped",), {}, "q_proj: group_size 32 must divide 48 columns"),
    "odd": (("int4-grouped",), {"group_size": 0}, "group_size 0 must divide"),
    "spare": (("int8-dynamic",), {"group_size": 8}, "has no groups, got group_size 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_nothing_is_swapped(case):
    model = small("llama")
    before = linears_of(model)
    given, named, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        quantize_(model, *given, **named)
    assert linears_of(model) == before


@each_scheme
def test_weights_that_are_not_finite_are_refused_with_their_name(scheme):
    model = small("gemma")
    model.blocks[1].ffn.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.ffn.down_proj has .* not finite"):
        quantize_(model, scheme, **options(scheme))
    assert len(linears_of(model)) == 2 * 7


def test_quantised_twice_is_refused_also_in_part():
    model = small("phi")
    quantize_(model, "int8-weight-only", match="ffn")
    left = linears_of(model)
    with pytest.raises(ValueError, match=r"ffn\.up_proj is quantised already"):
        quantize_(model, "int4-grouped", group_size=8)
    assert linears_of(model) == left


def test_sizes_can_be_had_without_weights():
    with torch.device("meta"):
        model = phi.Phi(phi.PHI_2)
    linears = linears_of(model)
    plain = weight_bytes(model)
    matrices = sum(linear.weight.numel() for linear in linears.values())
    quantize_(model, "int4-grouped")
    assert plain - weight_bytes(model) == matrices * 4 - matrices // 2 - matrices // 8


def test_a_state_dict_holds_what_is_stored():
    source, model = small("phi"), small("phi")
    for each in (source, model):
        quantize_(each, "int4-grouped", group_size=8)
    tokens = tokens_for("phi")
    assert not torch.allclose(source(tokens), model(tokens))
    model.load_state_dict(source.state_dict())
    assert torch.equal(source(tokens), model(tokens))


# torchao beside it


def torchao_configs():
    import torchao.quantization as ao

    group = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
    quiet = {"set_inductor_config": False}
    return {
        "int8-weight-only": ao.Int8WeightOnlyConfig(**quiet),
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(**quiet),
        "int4-grouped": ao.IntxWeightOnlyConfig(**group),
    }


def stored_integers(layer):
    return unpack_int4(layer.integers) if layer.bits == 4 else layer.integers


@each_scheme
@pytest.mark.parametrize("bias", [False, True])
def test_torchao_stores_the_same_integers_and_scales(scheme, bias):
    from torchao.quantization import quantize_ as torchao_quantize_

    ours = nn.Sequential(nn.Linear(96, 48, bias))
    theirs, x = copy.deepcopy(ours), torch.randn(3, 5, 96)
    plain = ours(x)
    quantize_(ours, scheme)
    torchao_quantize_(theirs, torchao_configs()[scheme])
    stored = theirs[0].weight
    assert torch.equal(stored.qdata, stored_integers(ours[0]))
    assert torch.equal(stored.scale.view_as(ours[0].scale), ours[0].scale)
    if scheme == "int8-weight-only":  # it scales the sums, we the weights
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=5e-6)
    else:
        assert torch.equal(ours(x), theirs(x))
    assert (ours(x) - plain).abs().max() > 1e-3


def test_torchao_s_int8_scales_stop_at_the_eps_of_float32():
    """The one difference: rows whose largest weight is below 1.5e-5 lose levels."""
    from torchao.quantization import quantize_ as torchao_quantize_

    ours = nn.Sequential(nn.Linear(32, 2, bias=False))
    ours[0].weight.data = torch.randn(2, 32) * torch.tensor([[1e-4], [1e-7]])
    theirs = copy.deepcopy(ours)
    quantize_(ours, "int8-weight-only")
    torchao_quantize_(theirs, torchao_configs()["int8-weight-only"])
    scales = theirs[0].weight.scale.flatten()
    assert scales[1] == torch.finfo(torch.float32).eps
    assert scales[0] == ours[0].scale[0, 0]
    assert ours[0].integers[1].min() == -128 or ours[0].integers[1].max() == 127
    assert theirs[0].weight.qdata[1].abs().max() < 5


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_pt2e_s_weights_are_the_same_integers(unchecked):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net, x = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)), None
    x = torch.randn(64, 32)
    graph = torch.export.export(net.eval(), (x,)).module()
    config = x86.get_default_x86_inductor_quantization_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
        prepared(x)
        converted = convert_pt2e(prepared)
    buffers = dict(converted.named_buffers())
    for i, linear in enumerate((net[0], net[2])):
        integers, scale = quantize_groups(linear.weight, 8, linear.in_features)
        assert torch.equal(buffers[f"_frozen_param{i}"], integers)
        torch.testing.assert_close(buffers[f"_scale_{i}"], scale[:, 0])
    near, far = (
        ((converted(k * x) - net(k * x)).abs().max() / net(k * x).abs().max()).item()
        for k in (1, 100)
    )
    assert near < 0.1
    assert far > 0.5  # its activations' scale is from what it has seen
