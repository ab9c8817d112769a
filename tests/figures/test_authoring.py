"""The numbers and words behind the pictures of the chapter on authoring."""

from functools import partial

import pytest
import torch

from annotated_src.figures.authoring import (
    PARTS,
    ROWS,
    SourceDiff,
    block_by_row,
    code_lines,
    draw_blocks,
    draw_sizes,
    size_data,
)
from annotated_src.masks import causal_mask
from annotated_src.models import chatglm, gemma, llama, phi
from annotated_src.positions import BlankIds
from annotated_src.rotary_2d import rotation

GLM = chatglm.ChatGLMConfig(96, 2, 48, 4, 80, 128, 1e-5, BlankIds(1, 2, 3))
MODELS = {
    "Llama": (llama.Llama, llama.tiny_config()),
    "Gemma": (gemma.Gemma, gemma.tiny_config()),
    "Phi-2": (phi.Phi, phi.tiny_config()),
    "ChatGLM-6B": (chatglm.ChatGLM, GLM),
}


class Before:
    """Not what it will be."""

    def __init__(self):
        self.kept = 1
        self.gone = sum([1, 2])

    def call(self, x):
        """Say it."""
        return sum(
            [x],
        )


class After:
    """What it was not."""

    def __init__(self):
        self.kept = 1
        # Say more.
        self.new = Gemma()
        self.name = "Gemma"


class Gemma:
    pass


def test_a_diff_has_code_and_no_words():
    diff = SourceDiff(Before, After)
    shown = diff._repr_markdown_().splitlines()
    assert shown[0] == "```diff"
    assert shown[-1] == "```"
    assert "+        self.new = Model()" in shown
    assert "-        self.gone = sum([1, 2])" in shown
    assert not any("what" in line.lower() or "say" in line.lower() for line in shown)
    assert (diff.removed, diff.added, diff.total) == (6, 3, 8)
    assert repr(diff) == "3 lines new, 6 gone"


def test_a_model_is_no_change_to_itself():
    diff = SourceDiff(llama.Llama, llama.Llama)
    assert (diff.lines, diff.removed, diff.added) == ([], 0, 0)


def test_short_brackets_are_joined_and_long_ones_kept():
    lines = code_lines(llama.LlamaBlock)
    assert "        self.attention = Attention(" in lines
    (blocks,) = (line for line in code_lines(llama.Llama) if "ModuleList" in line)
    assert blocks.strip().startswith(
        "self.blocks = nn.ModuleList(ModelBlock(config) fo"
    )


def test_the_leaves_keep_their_names():
    """A GemmaRMSNorm is a part, not the model's name."""
    lines = code_lines(gemma.GemmaBlock)
    assert any("GemmaRMSNorm" in line for line in lines)
    assert lines[0] == "class ModelBlock(nn.Module):"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_what_its_block_computes(row):
    kind, config = MODELS[row.name]
    model = kind(config).double()
    block = model.blocks[0]
    for weight in block.parameters():
        weight.data.normal_(std=0.3)
    mask, positions = causal_mask(5), torch.arange(5).expand(1, 2, 5)

    def still(x):
        return x

    rotate = rotation(positions, 12, torch.float64) if row.name[0] == "C" else still
    norms = [part for name, part in block.named_children() if "norm" in name]
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    found = block_by_row(
        row,
        norms,
        partial(block.attention, rotate=rotate, mask=mask),
        block.ffn,
        x,
        chatglm.ALPHA,
    )
    torch.testing.assert_close(found, block(x, rotate, mask))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_names_the_parts_that_are_there(row):
    kind, config = MODELS[row.name]
    model = kind(config)
    norm = type(model.norm).__name__
    words = {
        "RMSNorm": "RMS\nNorm",
        "GemmaRMSNorm": "RMS\n1 + w",
        "LayerNorm": "Layer\nNorm",
    }
    assert row.norms == words[norm]
    scaled = type(model.embedding).__name__ == "ScaledEmbedding"
    assert ("√D" in row.embedding) == scaled
    assert ("no gate" in row.ffn) == (not hasattr(model.blocks[0].ffn, "gate_proj"))
    assert ("again" in row.head) == (not hasattr(model, "lm_head"))
    if row.name == "Phi-2":
        assert phi.PHI_2.rotary_dim / phi.PHI_2.head_dim == 0.4
        assert model.lm_head.bias is not None


def test_the_picture_lights_what_llama_has_not():
    lit = {}
    for ax, row in zip(draw_blocks().axes, ROWS, strict=True):
        colours = [patch.get_facecolor()[:3] for patch in ax.patches]
        lit[row.name] = sum(colour != (1, 1, 1) for colour in colours)
        assert row.name in {text.get_text() for text in ax.texts}
    assert lit == {"Llama": 0, "Gemma": 6, "Phi-2": 5, "ChatGLM-6B": 6}


def test_sizes_are_those_of_the_models():
    data = size_data(MODELS)
    assert data.names == tuple(MODELS)
    for (kind, config), total, cached in zip(
        MODELS.values(), data.totals.tolist(), data.cached.tolist(), strict=True
    ):
        model = kind(config)
        assert total == sum(weight.numel() for weight in model.parameters())
        held = sum(layer.num_bytes for layer in model.new_cache(1, 1))
        assert held == 4 * cached
    assert (data.counts > 0).all()
    table = data.counts[:, PARTS.index("embedding and head")].tolist()
    assert table == [2 * 96 * 48, 96 * 48, 2 * 96 * 48 + 96, 96 * 48]


def test_the_picture_says_the_sizes():
    models = {"Gemma 7B": (gemma.Gemma, gemma.GEMMA_7B)}
    above, below = draw_sizes(size_data(models)).axes
    assert "8.54" in {text.get_text() for text in above.texts}
    assert "459" in {text.get_text() for text in below.texts}
