"""Fused rows come apart as the models that use them take them apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BloomConfig, FalconConfig, GPTNeoXConfig, Phi3Config
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from annotated_src.attention import Attention
from annotated_src.attention_by_layer import FusedAttention
from annotated_src.fused_qkv import LAYOUTS, join_qkv, split_qkv

WIDTH, HEADS, SIZE = 24, 6, 4
HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
COS, SIN = torch.ones(1, 5, SIZE), torch.zeros(1, 5, SIZE)  # no turn
OPEN = torch.zeros(1, 1, 5, 5)  # added to the scores: all see all


def gpt_neox():
    c = GPTNeoXConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
    c._attn_implementation = "eager"
    module = GPTNeoXAttention(c, 0)

    def run():
        return module(HIDDEN, OPEN, position_embeddings=(COS, SIN))[0]

    return module.query_key_value, module.dense, run


def bloom():
    module = BloomAttention(BloomConfig(hidden_size=WIDTH, n_head=HEADS), 0)
    nothing = torch.zeros_like(HIDDEN)

    def run():
        return module(HIDDEN, nothing, torch.zeros(12, 1, 5), OPEN)[0]

    return module.query_key_value, module.dense, run


def falcon(num_kv_heads, new):
    c = FalconConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_kv_heads=num_kv_heads,
        new_decoder_architecture=new,
        multi_query=True,
        alibi=False,
        bias=True,
    )
    c._attn_implementation = "eager"
    module = FalconAttention(c, 0)

    def run():
        return module(HIDDEN, None, OPEN, position_embeddings=(COS, SIN))[0]

    return module.query_key_value, module.dense, run


def phi3(num_kv_heads):
    c = Phi3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        pad_token_id=None,
    )
    c._attn_implementation = "eager"
    module = Phi3Attention(c, 0)

    def run():
        return module(HIDDEN, (COS, SIN), OPEN)[0]

    return module.qkv_proj, module.o_proj, run


def chatglm():
    """Ours; that it is the original's, tests/test_golden.py shows."""
    module = FusedAttention(WIDTH, HEADS, layer=3)
    every = torch.ones(1, 1, 5, 5, dtype=torch.bool)

    def run():
        return module(HIDDEN, lambda x: x, every)

    return module.qkv_proj, module.out_proj, run


MODELS = {
    "GPT-NeoX": (gpt_neox, 6, {"per head", "per group"}),
    "BLOOM": (bloom, 6, {"per head", "per group"}),
    "ChatGLM": (chatglm, 6, {"per head", "per group"}),
    "Falcon 40B": (lambda: falcon(2, new=True), 2, {"per group"}),
    # One group: both orders are the same.
    "Falcon 7B": (lambda: falcon(1, new=False), 1, {"per group", "plain"}),
    "Phi-3": (lambda: phi3(6), 6, {"plain"}),
    "Phi-3, grouped": (lambda: phi3(2), 2, {"plain"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attention_is_that_of_the_model_in_its_layout_alone(name, layout):
    make, num_kv_heads, right = MODELS[name]
    fused, dense, run = make()
    for tensor in (*fused.parameters(), *dense.parameters()):
        nn.init.normal_(tensor, std=0.5)
    if layout == "per head" and num_kv_heads != HEADS:
        with pytest.raises(ValueError, match=f"got 6 and {num_kv_heads} heads"):
            split_qkv(fused.weight, HEADS, num_kv_heads, SIZE, layout)
        return
    ours = Attention(WIDTH, HEADS, num_kv_heads, SIZE, bias=True)
    for kind in ("weight", "bias"):
        tensor = getattr(fused, kind)
        tensor = torch.zeros(len(fused.weight)) if tensor is None else tensor
        parts = split_qkv(tensor, HEADS, num_kv_heads, SIZE, layout)
        for part, module in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
            getattr(getattr(ours, module), kind).copy_(part)
    ours.out_proj.weight.copy_(dense.weight)
    ours.out_proj.bias.zero_() if dense.bias is None else ours.out_proj.bias.copy_(
        dense.bias
    )
    every = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    found, expected = ours(HIDDEN, lambda x: x, every), run()
    if layout in right:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert (found - expected).abs().max() > 0.1


def test_the_rows_of_the_docstring():
    names = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    q, k, v = (torch.tensor(x) for x in ([0, 1, 2, 3], [4, 5], [6, 7]))
    for layout, expected in (
        ("plain", "q0 q1 q2 q3 k0 k1 v0 v1"),
        ("per group", "q0 q1 k0 v0 q2 q3 k1 v1"),
    ):
        joined = join_qkv(q, k, v, 1, layout)
        assert " ".join(names[i] for i in joined.tolist()) == expected
    k, v = torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11])
    expected = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert join_qkv(q, k, v, 1, "per head").tolist() == expected


@given(
    layout=st.sampled_from(LAYOUTS),
    groups=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    head_dim=st.integers(1, 5),
    columns=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_apart_and_together_is_nothing(layout, groups, head_dim, columns, dtype):
    num_kv_heads, group = groups
    group = 1 if layout == "per head" else group
    num_heads = num_kv_heads * group
    fused = torch.randn((num_heads + 2 * num_kv_heads) * head_dim, *columns).to(dtype)
    parts = split_qkv(fused, num_heads, num_kv_heads, head_dim, layout)
    heads = [num_heads, num_kv_heads, num_kv_heads]
    assert [len(part) for part in parts] == [n * head_dim for n in heads]
    assert torch.equal(join_qkv(*parts, head_dim, layout), fused)
    if group == 1:
        parts = split_qkv(fused, num_heads, num_heads, head_dim, "per head")
        assert torch.equal(join_qkv(*parts, head_dim, "per group"), fused)


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        ((4, 2, 8), "plain", "4 query heads and 2 x 2 .* of 8 .* are 64 rows, got 63"),
        ((4, 2, 8), "by head", r"one of .*'per head'.*, got 'by head'"),
        ((4, 3, 8), "plain", r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ((4, 0, 8), "plain", r"num_kv_heads \(0\) must divide"),
        ((4, 2, 8), "per head", "got 4 and 2 heads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sizes, layout, message):
    with pytest.raises(ValueError, match=message):
        split_qkv(torch.zeros(63, 5), *sizes, layout)


@pytest.mark.parametrize(
    ("rows", "head_dim", "layout", "message"),
    [
        ((8, 4, 4), 3, "plain", r"rows \[8, 4, 4\] are not heads of 3"),
        ((8, 4, 4), 0, "plain", "not heads of 0"),
        ((8, 4, 4), 4, "per head", "got 2 and 1 heads"),
        ((12, 8, 8), 4, "per group", r"num_kv_heads \(2\) must divide num_heads \(3\)"),
        ((8, 4, 4), 4, "grouped", "got 'grouped'"),
    ],
)
def test_what_cannot_be_joined_is_refused(rows, head_dim, layout, message):
    with pytest.raises(ValueError, match=message):
        join_qkv(*(torch.zeros(n, 5) for n in rows), head_dim, layout)


def test_keys_and_values_that_differ_in_number(unchecked):
    parts = torch.zeros(8, 5), torch.zeros(4, 5), torch.zeros(8, 5)
    with pytest.raises(ValueError, match=r"rows \[8, 4, 8\] .* as many k as v"):
        join_qkv(*parts, 4, "plain")
