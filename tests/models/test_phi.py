"""What only Phi does. What it shares with Gemma is in test_decoders.py."""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers

from annotated_src.checkpoint import load_model
from annotated_src.masks import causal_mask
from annotated_src.models.phi import PHI_2, Phi, PhiBlock, PhiConfig, tiny_config
from annotated_src.rotary import apply_rotary, rope_tables
from annotated_src.shards import CheckpointError

# microsoft/phi-2's config.json, as transformers 4 wrote it.
FOUR = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
ABOVE = ("rope_scaling", "rope_theta", "partial_rotary_factor")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
FIVE = {k: v for k, v in FOUR.items() if k not in ABOVE} | {"rope_parameters": ROPE}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_the_real_sizes():
    assert PhiConfig.from_hf(FOUR) == PHI_2
    with torch.device("meta"):
        theirs = transformers.PhiForCausalLM(transformers.PhiConfig(**FIVE))
        ours = Phi(PHI_2)
    counts = [sum(w.numel() for w in model.parameters()) for model in (ours, theirs)]
    assert counts == [2_779_683_840] * 2
    assert theirs.model.rotary_emb.inv_freq.shape == (PHI_2.rotary_dim // 2,)


@pytest.mark.parametrize(
    "config",
    [
        FOUR,
        FIVE,
        without(FIVE, "tie_word_embeddings", "qk_layernorm", "num_key_value_heads"),
        FIVE | {"partial_rotary_factor": 0.9},  # the section is newer
        FOUR | {"num_key_value_heads": None, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_config_of_transformers_4_and_5(config):
    assert PhiConfig.from_hf(config) == PHI_2


def test_without_a_share_half_of_each_head_turns():
    found = PhiConfig.from_hf(without(FOUR, "partial_rotary_factor"))
    assert found.rotary_dim == 40
    theirs = transformers.PhiConfig(**without(FOUR, "partial_rotary_factor"))
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5


def test_config_that_transformers_wrote(make_decoder):
    path, _, model = make_decoder("phi-truncated")
    written = PhiConfig(97, 3, 48, 6, 6, 12, 4, 80, 64, 1e-2, 500.0)
    assert model.config == written
    config = json.loads((path / "config.json").read_text("utf-8"))
    assert PhiConfig.from_hf(config) == written


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', Phi has 'gelu_new'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, Phi has False"),
        ({"qk_layernorm": True}, "qk_layernorm is True, Phi has False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        (
            {"partial_rotary_factor": 0.01},
            "factor 0.01 turns 0 features of a head of 80",
        ),
        ({"partial_rotary_factor": 0.42}, "0.42 turns 33 .* must be an even number"),
        ({"partial_rotary_factor": 1.1}, "1.1 turns 88 features of a head of 80"),
    ],
)
def test_a_config_that_asks_for_what_phi_does_not_do(asked, message):
    with pytest.raises(ValueError, match=message):
        PhiConfig.from_hf(FOUR | asked)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "layer_norm_eps",
    ],
)
def test_a_config_without_a_size(key):
    with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
        PhiConfig.from_hf(without(FOUR, key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", 0),
        ("partial_rotary_factor", -0.4),
        ("partial_rotary_factor", "half"),
        ("qk_layernorm", 1),
    ],
)
def test_a_value_that_cannot_be(make_decoder, tmp_path, key, value):
    folder = shutil.copytree(make_decoder("phi-half").path, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = without(config, "rope_parameters") | {key: value}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match=f"{key} is {value!r}, not"):
        load_model(folder)


def test_without_a_word_on_tying_it_is_untied(make_decoder, tmp_path):
    path, _, model = make_decoder("phi-half")
    folder = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokens = torch.arange(10)[None]
    assert torch.equal(load_model(folder)(tokens), model(tokens))


def test_a_missing_bias_is_noticed(make_decoder):
    """Each of them: what is not in a file must not be left random, or zero."""
    names = set(make_decoder("phi-half").model.state_dict())
    biases = {name for name in names if name.endswith("bias")}
    assert len(biases) == 3 * 7 + 2  # qkv, out, up, down, norm; final norm, head
    assert {n.replace("weight", "bias") for n in names} - biases == {"embedding.bias"}


def test_only_the_first_features_turn(make_decoder):
    model = make_decoder("phi-truncated").model
    x = torch.randn(1, 6, 3, 12)
    cos, sin = rope_tables(torch.tensor([[5, 6, 7]]), model.frequencies(), x.dtype)
    turned = apply_rotary(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert (turned[..., :4] != x[..., :4]).all()
    # Pair i turns by base ** (-2 i / 4), not / 12: as if the head had 4 features.
    torch.testing.assert_close(model.frequencies(), torch.tensor([1.0, 500.0**-0.5]))


def test_both_branches_are_summed_before_they_are_added():
    """256 + 0.75 rounds back to 256 in bfloat16, twice; 256 + 1.5 is 258."""
    block = PhiBlock(tiny_config()).to(torch.bfloat16)
    for layer in (block.attention.out_proj, block.ffn.down_proj):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 0.75)
    x = torch.full((1, 1, 48), 256.0, dtype=torch.bfloat16)
    rotate = partial(
        apply_rotary, cos=x.new_ones(1, 1, 1, 2), sin=x.new_zeros(1, 1, 1, 2)
    )
    assert (block(x, rotate, causal_mask(1)) == 258).all()


def test_the_tiny_model_runs():
    config = tiny_config()
    assert 0 < config.rotary_dim < config.head_dim
    assert Phi(config)(torch.arange(6)[None]).shape == (1, 6, 96)
