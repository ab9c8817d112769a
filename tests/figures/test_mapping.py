"""The names in the Rosetta tables are real, and the pictures show what was computed."""

import ast
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from annotated_src.figures.mapping import (
    FIELDS,
    STONE,
    draw_maps,
    draw_rows,
    maps_data,
    rosetta_data,
    rosetta_markdown,
    rows_data,
    to_meta_rows,
)
from annotated_src.fused_qkv import join_qkv
from annotated_src.golden import golden
from annotated_src.models.llama import Llama, tiny_config
from annotated_src.rotary import rows_to_half_split

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def column(name):
    """The modules that a column names, in two layers, with those that are not there."""
    cells = [line[name] for line in rosetta_data().values() if line[name]]
    return {cell.format(layer) for cell in cells for layer in (0, 1)}


def modules(names):
    return {name.removesuffix(".weight") for name in names if name.endswith(".weight")}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES))),
        ("Gemma", lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=4))),
        ("Phi", lambda: PhiForCausalLM(PhiConfig(**SIZES))),
    ],
)
def test_hugging_faces_names_are_those_of_its_models(name, make):
    model = make()
    tied = {"lm_head"} if name == "Gemma" else set()
    assert column(name) == modules(model.state_dict()) - tied


def test_chatglms_names_are_those_of_the_golden_file():
    stored = {n for n in modules(golden("weights")) if ".2." not in n}
    assert column("ChatGLM-6B") == stored


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Llama", gguf.MODEL_ARCH.LLAMA),
        ("Gemma", gguf.MODEL_ARCH.GEMMA),
        ("Phi", gguf.MODEL_ARCH.PHI2),
        ("Phi-2, first files", gguf.MODEL_ARCH.PHI2),
        ("Llama, Meta's files", gguf.MODEL_ARCH.LLAMA),
    ],
)
def test_llama_cpp_reads_a_line_as_one_tensor(name, kind):
    """gguf translates the names of every column; in a line they all mean the same."""
    known = gguf.get_tensor_name_map(kind, 2)
    for ours, line in rosetta_data().items():
        if line[name]:
            found = known.get_name(line[name].format(1))
            expected = line["Llama in GGUF"].format(1)
            if "Wqkv" in line[name]:
                expected = "blk.1.attn_qkv"
            assert found == expected, ours


@pytest.fixture(scope="module")
def library(converter):
    """The on-device library's loader, as a tree: to import it takes long."""
    path = Path(converter.origin).parent / "generative" / "utilities" / "loader.py"
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name: node for node in ast.walk(tree) if hasattr(node, "name")}


def test_the_fields_are_those_of_the_library(library):
    body = library["TensorNames"].body
    fields = {ast.unparse(x.target) for x in body if hasattr(x, "target")}
    assert set(FIELDS.values()) <= fields
    assert len(set(FIELDS.values())) == 12


@pytest.mark.parametrize("layout", ["per group", "plain"])
def test_the_library_joins_as_we_do(library, layout):
    code = "from __future__ import annotations\n" + ast.unparse(library["_fuse_qkv"])
    found = {"torch": torch}
    exec(code, found)
    config = SimpleNamespace(
        qkv_fused_interleaved=layout == "per group",
        num_heads=6,
        num_query_groups=2,
        head_dim=3,
    )
    parts = torch.randn(18, 5), torch.randn(6, 5), torch.randn(6, 5)
    joined = found["_fuse_qkv"](None, config, *parts)
    assert torch.equal(joined, join_qkv(*parts, 3, layout))


def test_the_gaps_are_those_of_the_models():
    gaps = {
        (ours.split(".")[-1], column)
        for ours, line in rosetta_data().items()
        for column, name in line.items()
        if not name
    }
    assert gaps == {
        ("lm_head", "Gemma"),
        ("gate_proj", "Phi"),
        ("ffn_norm", "Phi"),
        ("gate_proj", "Phi-2, first files"),
        ("ffn_norm", "Phi-2, first files"),
        ("gate_proj", "ChatGLM-6B"),
    }


def test_our_modules_are_those_of_a_llama():
    with torch.device("meta"):
        model = Llama(tiny_config())
    layers = {name.format(layer) for name in FIELDS for layer in (0, 1)}
    assert layers == modules(model.state_dict())


def test_the_markdown_shortens_nothing_away():
    for columns in (list(STONE)[:3], list(STONE)[3:]):
        lines = [
            x.strip("| ").split(" | ") for x in rosetta_markdown(columns).split("\n")
        ]
        assert len(lines) == 2 + 12
        for cells, (ours, line) in zip(lines[2:], rosetta_data().items(), strict=True):
            wanted = [ours, *(line[name] for name in columns)]
            for head, cell, name in zip(lines[0], cells, wanted, strict=True):
                prefix = head.split("`")[1] if "`" in head else ""
                plain = cell.replace("… ", prefix).replace("`", "").replace("–", "")
                assert plain == name


def test_the_four_matrices():
    data = rows_data()
    names = [
        " ".join(
            f"{'qkv'[k]}{h}"
            for k, h in zip(m.kinds.tolist(), m.heads.tolist(), strict=True)
        )
        for m in data
    ]
    assert names == [
        "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3",
        "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
        "q0 q1 q2 q3 q4 q5 q6 q7 k0 k1 v0 v1",
        "q0 q1 q2 q3 k0 v0 q4 q5 q6 q7 k1 v1",
    ]
    figure = draw_rows(data)
    for ax, text in zip(figure.axes, names, strict=True):
        assert " ".join(t.get_text() for t in ax.texts) == text


def test_metas_rows_and_back():
    weight = torch.randn(12, 5)
    assert not torch.equal(to_meta_rows(weight, 6), weight)
    assert torch.equal(rows_to_half_split(to_meta_rows(weight, 6), 2), weight)


def test_the_map_that_is_right_is_the_models():
    torch.manual_seed(5)
    model = Llama(tiny_config())
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    tokens, seen = torch.randint(96, (1, 6)), []

    def keep(queries, keys, values, mask):
        values = torch.eye(6, 10).expand(1, 2, 6, 10)  # what comes out are the weights
        seen.append(type(model.blocks[1].attention).attend(queries, keys, values, mask))
        return seen[-1]

    data = maps_data(model, tokens, list("abcdef"), at=(1, 3))
    model.blocks[1].attention.attend = keep
    model(tokens)
    torch.testing.assert_close(data.right, seen[0][0, 3, :, :6], rtol=1e-4, atol=1e-5)
    for wrong in (data.misread, data.unturned):
        torch.testing.assert_close(wrong.sum(-1), torch.ones(6))
        assert (wrong - data.right).abs().max() > 0.05
    figure = draw_maps(data)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list("abcdef")
    assert len(figure.axes) == 3


def test_no_hook_is_left_behind():
    model = Llama(tiny_config())
    maps_data(model, torch.arange(4)[None], list("abcd"), at=(0, 0))
    assert not model.blocks[0].attention._forward_pre_hooks
