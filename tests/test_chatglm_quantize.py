import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from annotated_src.chatglm_quantize import (
    QuantizedLinear,
    dequantize_rows,
    quantize_linears,
    quantize_rows,
)
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.quantize import weight_bytes

GOLDEN = Path(__file__).parent / "golden" / "chatglm6b"
HALF, FULL = torch.float16, torch.float32
LARGEST = {8: 127, 4: 7}
each_bits = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "quantization.safetensors")


def integers_of(storage, bits):
    """Undo the packing byte by byte, in Python."""
    if bits == 8:
        return storage.tolist()
    signed = [n - 16 if n > 7 else n for n in range(16)]
    return [
        [signed[half] for byte in row for half in (byte % 256 // 16, byte % 16)]
        for row in storage.tolist()
    ]


def by_loops(weight, bits):
    """One weight after the other, in Python, where round is half to even too."""
    integers, scales = [], []
    for row in weight.tolist():
        largest = max(abs(value) for value in row)
        scale = torch.tensor(largest / LARGEST[bits], dtype=HALF).item()
        integers.append([round(value / scale) for value in row])
        scales.append(scale)
    return integers, scales


def small_llama(**other):
    sizes = {"num_layers": 2, "embed_dim": 24, "num_heads": 3, "num_kv_heads": 1}
    sizes |= {"head_dim": 6, "ffn_dim": 32, "max_seq_len": 16, "vocab_size": 30}
    sizes |= {"norm_eps": 1e-5, "rope_base": 1e4, "tied_head": False} | other
    return Llama(LlamaConfig(**sizes))


def linears_of(module):
    return [name for name, m in module.named_modules() if type(m) is nn.Linear]


# The rows


@each_bits
def test_storage_and_scales_are_the_original_s(golden, bits):
    storage, scale = quantize_rows(golden["weight"], bits)
    assert storage.dtype == torch.int8
    assert scale.dtype == HALF
    assert torch.equal(storage, golden[f"int{bits}/weight"])
    assert torch.equal(scale, golden[f"int{bits}/weight_scale"])


@each_bits
def test_what_is_made_of_them_is_the_original_s(golden, bits):
    stored = golden[f"int{bits}/weight"], golden[f"int{bits}/weight_scale"]
    found = dequantize_rows(*stored, bits, FULL)
    assert torch.equal(found, golden[f"int{bits}/dequantized_fp32"])


@each_bits
def test_the_layer_s_output_is_the_original_s(golden, bits):
    linear = nn.Linear(64, 64).half()
    linear.load_state_dict({k: golden[k] for k in ("weight", "bias")})
    layer, x = QuantizedLinear.from_linear(linear, bits), golden[f"int{bits}/x"]
    expected = golden[f"int{bits}/y_fp32"]
    torch.testing.assert_close(layer(x.float()), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=1e-2)
    # And the weight of 4 or 8 bits is not the weight in full.
    assert not torch.allclose(linear.float()(x.float()), expected, atol=1e-3)


@each_bits
def test_rows_are_rounded_one_weight_after_the_other(bits):
    weight = torch.randn(5, 12, dtype=torch.float64) * torch.rand(5, 1)
    storage, scale = quantize_rows(weight, bits)
    integers, scales = by_loops(weight, bits)
    assert integers_of(storage, bits) == integers
    assert scale.tolist() == scales


def test_the_even_column_lies_in_the_high_half_of_a_byte():
    weight = torch.tensor([[7.0, -1.0, -7.0, 2.0, 0.0, -3.0]])  # so the scale is 1
    storage, scale = quantize_rows(weight, 4)
    assert scale.tolist() == [1.0]
    assert [byte % 256 for byte in storage[0].tolist()] == [0x7F, 0x92, 0x0D]


def test_every_byte_gives_its_two_signed_halves():
    storage = torch.arange(-128, 128).to(torch.int8)[None]
    found = dequantize_rows(storage, torch.ones(1, dtype=HALF), 4, FULL)
    assert found.tolist() == integers_of(storage, 4)
    assert set(found[0].tolist()) == set(range(-8, 8))


def test_half_way_goes_to_the_even_integer():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(weight, 8)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_it_divides_in_the_weight_s_own_dtype(golden):
    """The quotient in half and in float32 rounds differently, now and then."""
    weight = golden["weight"]
    in_half, in_full = (quantize_rows(w, 8)[0] for w in (weight, weight.float()))
    differ = (in_half != in_full).sum().item()
    assert 0 < differ < 0.05 * weight.numel()
    assert (in_half.int() - in_full.int()).abs().max() == 1


@each_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_weight_moves_by_much_more_than_half_a_step(bits, dtype):
    weight = torch.randn(40, 64).to(dtype)
    storage, scale = quantize_rows(weight, bits)
    found = dequantize_rows(storage, scale, bits, FULL)
    # The scale itself is off by up to 2 ** -11 of its size, the quotient as well.
    bound = scale.float()[:, None] * (0.5 + 2 * LARGEST[bits] * 2**-11)
    assert ((found - weight.float()).abs() <= bound).all()
    assert storage.dtype == torch.int8
    assert scale.dtype == HALF


@each_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_rounded_once_to_the_dtype_asked_for(bits, dtype):
    storage, scale = quantize_rows(torch.randn(8, 32), bits)
    found = dequantize_rows(storage, scale, bits, dtype)
    exact = torch.tensor(integers_of(storage, bits), dtype=torch.float64)
    exact = exact * scale.double()[:, None]
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


@each_bits
@pytest.mark.parametrize("tiny", [0.0, 2.0**-24])
def test_a_row_of_zeros_or_nearly_stays_zeros(bits, tiny):
    weight = torch.randn(3, 8).half()
    weight[1] = tiny
    storage, scale = quantize_rows(weight, bits)
    assert scale[1] == 0
    assert not storage[1].any()
    found = dequantize_rows(storage, scale, bits, HALF)
    assert found.isfinite().all()
    assert not found[1].any()
    # The original divides by that scale, and casts what comes of it to an integer.
    assert not (weight[1] / scale[1]).isfinite().any()


@each_bits
def test_the_threshold_of_zero_is_as_the_docstring_says(bits):
    threshold = LARGEST[bits] * 2.0**-25
    if bits == 8:
        assert threshold == pytest.approx(3.8e-6, rel=0.01)
    weight = torch.tensor([[0.99 * threshold] * 2, [1.01 * threshold] * 2])
    assert (quantize_rows(weight, bits)[1] > 0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("bits", "steps", "quotient", "wraps_to"),
    [(8, 16_192, 127.5, -128), (8, 190, 190, -66), (4, 45, 7.5, -8), (4, 10, 10, -6)],
)
def test_a_scale_rounded_down_in_half_does_not_wrap_around(
    bits, steps, quotient, wraps_to
):
    # Half counts in steps of 2 ** -24 down there: a scale can lose a third of itself.
    weight = torch.tensor([[steps * 2.0**-24, -steps * 2.0**-24]], dtype=HALF)
    scale = (weight.abs().max() / LARGEST[bits]).half()
    rounded = (weight / scale).round()
    assert (weight / scale)[0, 0] == quotient
    assert rounded[0, 0] > LARGEST[bits]
    # What the original stores: the low 8 or 4 bits of the integer.
    modulus = 2**bits
    wrapped = (int(rounded[0, 0]) + modulus // 2) % modulus - modulus // 2
    assert wrapped == wraps_to
    storage, found_scale = quantize_rows(weight, bits)
    assert found_scale[0] == scale
    assert integers_of(storage, bits) == [[LARGEST[bits], -LARGEST[bits] - 1]]
    sign = dequantize_rows(storage, scale[None], bits, FULL).sign()
    assert sign.tolist() == [[1, -1]]


@each_bits
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(bits, bad):
    weight = torch.randn(4, 6)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match=f"row 2 .* magnitude {abs(bad)}: .* finite"):
        quantize_rows(weight, bits)


@each_bits
def test_a_scale_beyond_half_is_refused(bits):
    weight = torch.tensor([[1.0, 2.0], [0.0, 65_504.0 * LARGEST[bits]]])
    assert quantize_rows(weight, bits)[1][1] == 65_504
    with pytest.raises(ValueError, match=f"row 1 .*scale for {bits} bits at most"):
        quantize_rows(2 * weight, bits)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5, 7, 16, -8])
def test_other_bits_are_refused(bits):
    message = f"bits must be 4 or 8, got {bits}"
    with pytest.raises(ValueError, match=message):
        quantize_rows(torch.randn(2, 8), bits)
    storage, scale = quantize_rows(torch.randn(2, 8), 8)
    with pytest.raises(ValueError, match=message):
        dequantize_rows(storage, scale, bits, FULL)
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(8, 2, bits)


@pytest.mark.parametrize(("cols", "bits"), [(7, 4), (1, 4), (0, 4), (0, 8)])
def test_columns_that_do_not_fill_bytes_are_refused(cols, bits):
    message = f"{bits} bits need whole bytes of columns, got {cols}"
    with pytest.raises(ValueError, match=message):
        quantize_rows(torch.randn(2, cols), bits)
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(cols, 2, bits)
    assert quantize_rows(torch.randn(2, 7), 8)[0].shape == (2, 7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_another_number_of_scales_is_refused_even_where_it_would_broadcast(size):
    storage, _ = quantize_rows(torch.randn(3, 8), 8)
    with pytest.raises(ValueError, match=rf"3 rows with \({size},\) scales"):
        dequantize_rows(storage, torch.ones(size, dtype=HALF), 8, FULL)


# The layer


@each_bits
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_a_linear_layer_with_the_rounded_weight(bits, bias):
    linear = nn.Linear(10, 6, bias=bias)
    layer = QuantizedLinear.from_linear(linear, bits)
    rounded = dequantize_rows(layer.weight, layer.weight_scale, bits, FULL)
    for shape in ((10,), (3, 10), (2, 5, 10)):
        x = torch.randn(shape)
        expected = nn.functional.linear(x, rounded, linear.bias)
        assert torch.equal(layer(x), expected)
    assert layer(torch.randn(0, 10)).shape == (0, 6)
    assert str(layer) == f"QuantizedLinear(10 -> 6, {bits} bits)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_has_the_dtype_of_x(dtype):
    layer = QuantizedLinear.from_linear(nn.Linear(10, 6), 8)
    assert layer(torch.randn(3, 10).to(dtype)).dtype == dtype


@each_bits
def test_its_tensors_have_the_names_and_shapes_of_the_original(bits):
    layer = QuantizedLinear.from_linear(nn.Linear(10, 6), bits)
    found = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
    assert found == {
        "weight": ((6, 10 * bits // 8), torch.int8),
        "weight_scale": ((6,), HALF),
        "bias": ((6,), FULL),
    }


@each_bits
@pytest.mark.parametrize("bias", [True, False])
def test_one_made_from_sizes_can_be_filled(bits, bias):
    source = QuantizedLinear.from_linear(nn.Linear(10, 6, bias=bias), bits)
    with torch.device("meta"):
        layer = QuantizedLinear(10, 6, bits, bias)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), source(x))
    empty = QuantizedLinear(10, 6, bits, bias)
    assert not empty(x).any()
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))
    assert empty.state_dict().keys() == source.state_dict().keys()


def test_gradients_pass_through_to_x_but_not_to_the_weight():
    linear = nn.Linear(10, 6)
    layer = QuantizedLinear.from_linear(linear, 8)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.weight_scale.requires_grad
    x = torch.randn(3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    rounded = dequantize_rows(layer.weight, layer.weight_scale, 8, FULL)
    torch.testing.assert_close(x.grad, 2 * layer(x).detach() @ rounded)
    assert layer.bias is linear.bias
    assert linear.weight.grad is None


def test_casting_to_float32_changes_no_weight_to_bfloat16_does():
    layer = QuantizedLinear.from_linear(nn.Linear(10, 6).half(), 8)
    x = torch.randn(3, 10)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer).float()(x), expected)
    cast = copy.deepcopy(layer).bfloat16()
    assert cast.weight.dtype == torch.int8
    assert not torch.equal(cast(x), expected)


# The model


@each_bits
def test_every_linear_of_the_blocks_is_swapped_and_nothing_else(bits):
    model = small_llama()
    before = copy.deepcopy(model)
    assert len(linears_of(model.blocks)) == 2 * 7
    assert quantize_linears(model, bits) is model
    assert linears_of(model) == ["lm_head"]
    quantized = dict(model.named_modules())
    for name in linears_of(before.blocks):
        layer, linear = quantized[f"blocks.{name}"], before.blocks.get_submodule(name)
        storage, scale = quantize_rows(linear.weight, bits)
        assert layer.bits == bits
        assert torch.equal(layer.weight, storage)
        assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(model.embedding.weight, before.embedding.weight)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


@each_bits
def test_the_model_runs_with_the_rounded_weights(bits):
    model, tokens = small_llama(), torch.randint(30, (2, 7))
    rounded = copy.deepcopy(model)
    for name in linears_of(rounded.blocks):
        linear = rounded.blocks.get_submodule(name)
        stored = quantize_rows(linear.weight, bits)
        linear.weight.data = dequantize_rows(*stored, bits, FULL)
    in_full = model(tokens)
    found = quantize_linears(model, bits)(tokens)
    assert torch.equal(found, rounded(tokens))
    assert not torch.allclose(found, in_full, atol=1e-4)


@each_bits
def test_a_model_on_the_meta_device_is_swapped_and_filled(bits):
    source, tokens = quantize_linears(small_llama(), bits), torch.randint(30, (2, 7))
    with torch.device("meta"):
        model = quantize_linears(small_llama(), bits)
    assert linears_of(model) == ["lm_head"]
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(tokens), source(tokens))


def test_a_model_that_cannot_be_quantised_stays_as_it_was():
    model = small_llama(ffn_dim=15)  # down_proj has odd columns, the others have not
    names = linears_of(model)
    with pytest.raises(ValueError, match=r"4 bits .* got 15 columns"):
        quantize_linears(model, 4)
    assert linears_of(model) == names
    model.blocks[0].attention.q_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"row 3 .* nan"):
        quantize_linears(model, 8)
    assert linears_of(model) == names


def test_quantising_twice_is_refused():
    model = quantize_linears(small_llama(), 8)
    with pytest.raises(ValueError, match="no linear layer: is it quantised already"):
        quantize_linears(model, 4)


@each_bits
def test_memory_is_counted_in_stored_bytes(bits):
    layer = QuantizedLinear(64, 48, bits)
    assert weight_bytes(layer) == 64 * 48 * bits // 8 + 48 * 2 + 48 * 4
    assert weight_bytes(nn.Linear(64, 48).half()) == 64 * 48 * 2 + 48 * 2
    tied = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)])
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 5 * 4 * 4
