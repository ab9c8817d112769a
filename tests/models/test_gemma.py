"""What only Gemma does. What it shares with Phi is in test_decoders.py."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from annotated_src.checkpoint import load_model
from annotated_src.models.gemma import (
    GEMMA_2B,
    GEMMA_7B,
    Gemma,
    GemmaConfig,
    tiny_config,
)
from annotated_src.shards import CheckpointError, read_tensors

# google/gemma-2b's config.json, first as it came out, then as it was mended.
FIRST = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
MENDED = FIRST | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}
SECTION = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
FIVE = {k: v for k, v in MENDED.items() if not k.startswith("rope_")} | SECTION
SIZES = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def count(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("config", "keys", "published"),
    [
        (GEMMA_2B, {}, 2_506_172_416),
        (
            GEMMA_7B,
            {
                "num_hidden_layers": 28,
                "hidden_size": 3072,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "intermediate_size": 24576,
            },
            8_537_680_896,
        ),
    ],
    ids=["2B", "7B"],
)
def test_the_real_sizes(config, keys, published):
    assert GemmaConfig.from_hf(FIRST | keys) == config
    with torch.device("meta"):
        theirs = transformers.GemmaForCausalLM(transformers.GemmaConfig(**FIVE | keys))
        assert count(Gemma(config)) == count(theirs) == published


@pytest.mark.parametrize(
    "config",
    [
        FIRST,
        MENDED,
        FIRST | {"hidden_activation": "gelu_pytorch_tanh"},
        FIVE | {"tie_word_embeddings": True, "use_bidirectional_attention": None},
    ],
)
def test_config_of_transformers_4_and_5(config):
    assert GemmaConfig.from_hf(config) == GEMMA_2B


def test_config_that_transformers_wrote(make_decoder):
    path, _, model = make_decoder("gemma-grouped")
    written = GemmaConfig(97, 3, 48, 6, 2, 12, 80, 64, 1e-2, 500.0)
    assert model.config == written
    config = json.loads((path / "config.json").read_text("utf-8"))
    assert GemmaConfig.from_hf(config) == written


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu', Gemma has 'gelu_pytorch_tanh'"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', Gemma has"),
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings is False, Gemma has True",
        ),
        ({"attention_bias": True}, "attention_bias is True, Gemma has False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"head_dim": 9}, "head_dim must be even, for RoPE, got 9"),
    ],
)
def test_a_config_that_asks_for_what_gemma_does_not_do(asked, message):
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_hf(FIRST | asked)


@pytest.mark.parametrize("key", SIZES)
def test_a_config_without_a_size(key):
    with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
        GemmaConfig.from_hf({k: v for k, v in FIRST.items() if k != key})


def edit(path, **entries):
    """Set keys of a JSON file; None takes them out."""
    found = json.loads(path.read_text("utf-8")) | entries
    kept = {key: value for key, value in found.items() if value is not None}
    path.write_text(json.dumps(kept), "utf-8")


@pytest.mark.parametrize("tied", [True, None])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_beside_the_embedding(make_decoder, tmp_path, tied, same):
    """The same matrix again is no harm; another one would be lost without a word."""
    path, _, model = make_decoder("gemma-grouped")
    folder = shutil.copytree(path, tmp_path / "copy")
    head = dict(read_tensors(folder))["model.embed_tokens.weight"].clone()
    head[5] += not same
    save_file({"lm_head.weight": head}, folder / "more.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    edit(index, weight_map=weight_map | {"lm_head.weight": "more.safetensors"})
    edit(folder / "config.json", tie_word_embeddings=tied)
    if same:
        tokens = torch.arange(10)[None]
        assert torch.equal(load_model(folder)(tokens), model(tokens))
    else:
        message = r"tie_word_embeddings is False.*files hold a head that is not the emb"
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def test_an_untied_gemma_is_refused(make_decoder, tmp_path):
    folder = shutil.copytree(make_decoder("gemma-grouped").path, tmp_path / "copy")
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"is False, Gemma has True$"):
        load_model(folder)


def test_a_fresh_gain_is_one():
    """Weights start at zero, and decay towards zero draws the gain to one."""
    model = Gemma(tiny_config())
    gains = [w for name, w in model.named_parameters() if "norm" in name]
    assert len(gains) == 5
    assert not any(gain.any() for gain in gains)
    assert model.norm(torch.randn(1, 3, 48)).square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_the_embeddings_and_not_the_heads(make_decoder, dtype):
    model = make_decoder("gemma-grouped", dtype=dtype).model
    weight, x = model.embedding.weight, torch.randn(1, 2, 48).to(dtype)
    assert torch.equal(model.score(x), torch.nn.functional.linear(x, weight))
    found = model.embedding(torch.tensor([[5]]))[0, 0]
    assert torch.equal(found, weight[5] * torch.tensor(48**0.5).to(dtype))


def test_the_tiny_model_runs():
    config = tiny_config()
    assert config.num_kv_heads == 1  # as in Gemma 2B
    assert config.num_heads * config.head_dim != config.embed_dim
    assert dataclasses.replace(GEMMA_2B, **vars(config)) == config
    assert Gemma(config)(torch.arange(6)[None]).shape == (1, 6, 96)
