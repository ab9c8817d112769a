"""Files from before Hugging Face's form: the first Phi-2, Meta's Llamas."""

import json
import re
import weakref

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig as TheirConfig
from transformers import PhiForCausalLM

from annotated_src.checkpoint import (
    TensorMismatch,
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.models.llama import Llama, tiny_config
from annotated_src.models.phi import PHI_2, Phi
from annotated_src.originals import (
    META_LLAMA_NAMES,
    PHI_MSFT_NAMES,
    read_phi_msft,
    turn_meta_rows,
    write_phi_msft,
)
from annotated_src.rotary import (
    apply_rotary_interleaved,
    half_split_to_interleaved,
)
from annotated_src.saving import save_checkpoint
from annotated_src.shards import CheckpointError, read_tensors
from annotated_src.tensor_names import split_fused

TOKENS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
WORDS = {
    "model_type": "phi-msft",
    "architectures": ["PhiForCausalLM"],
    "vocab_size": 97,
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 6,
    "n_head_kv": None,
    "n_inner": 80,
    "n_positions": 64,
    "rotary_dim": 4,
    "layer_norm_epsilon": 1e-2,
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
}
# As transformers' convert_phi_weights_to_hf.py maps them, the other way round.
OLD_NAMES = {
    r"^model.embed_tokens": "transformer.embd.wte",
    r"^model.final_layernorm": "lm_head.ln",
    r"^lm_head\.(weight|bias)": r"lm_head.linear.\1",
    r"^model.layers.(\d+).input_layernorm": r"transformer.h.\1.ln",
    r"^model.layers.(\d+).self_attn.dense": r"transformer.h.\1.mixer.out_proj",
    r"^model.layers.(\d+).mlp": r"transformer.h.\1.mlp",
}
FUSED = "transformer.h.1.mixer.Wqkv.weight"


def small_phi(num_kv_heads=6):
    config = TheirConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        layer_norm_eps=1e-2,
        initializer_range=0.2,
        # The first Phi-2 has this base without saying so.
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=None,  # its embedding would be zero
    )
    model = PhiForCausalLM(config).eval()
    for name, weight in model.state_dict().items():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
        elif "bias" in name:
            weight.normal_(std=0.5)
    return model


def old_tensors(model):
    """What the first files would hold: rows of all q, then all k, then all v."""
    state, old = model.state_dict(), {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            layer, kind = re.findall(r"layers\.(\d+)\..*\.(weight|bias)", name)[0]
            old[f"transformer.h.{layer}.mixer.Wqkv.{kind}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            for pattern, replacement in OLD_NAMES.items():
                name = re.sub(pattern, replacement, name)
            old[name] = tensor.clone()
    return old


def write_old(directory, model, **words):
    kv_heads = model.config.num_key_value_heads
    kv_heads = None if kv_heads == 6 else kv_heads
    config = {**WORDS, "n_head_kv": kv_heads, **words}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(old_tensors(model), directory / "model.safetensors")
    return directory


def change(directory, name, *tensor):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | dict.fromkeys([name], *tensor) if tensor else tensors, path)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_the_first_phi_2_computes_what_transformers_computes(tmp_path, num_kv_heads):
    reference = small_phi(num_kv_heads)
    model = load_model(write_old(tmp_path, reference))
    torch.testing.assert_close(
        model(TOKENS), reference(TOKENS).logits, rtol=1e-4, atol=1e-4
    )
    state = reference.state_dict()
    fused = load_file(tmp_path / "model.safetensors")
    assert not set(fused) & set(state)
    reference.save_pretrained(tmp_path / "new")
    newer = load_model(tmp_path / "new")
    for name, weight in newer.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_old_names_are_those_that_llama_cpp_knows():
    """gguf maps the old and the new name of a tensor of Phi-2 to the same one."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI2, 32)
    for ours, theirs in PHI_MSFT_NAMES.items():
        name = theirs.format(7).rpartition(".")[0]
        assert known.get_name(name), name
        if ours == "blocks.{}.attention.qkv_proj.weight":
            assert known.get_name(name) == "blk.7.attn_qkv"


def test_all_that_a_phi_has_is_named():
    with torch.device("meta"):
        model = Phi(PHI_2)
    names = names_by_layer(model, PHI_MSFT_NAMES)
    plain = {name for name in model.state_dict() if "attention" not in name}
    assert plain <= set(names.values())
    # 32 layers of a norm, Wqkv, out_proj, fc1, fc2 with biases; and three ends.
    assert len(names) == 32 * 10 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_saved_in_its_old_form_it_is_the_same_bytes(tmp_path, dtype, num_kv_heads):
    source = write_old(tmp_path, small_phi(num_kv_heads).to(dtype))
    model = load_model(source, dtype)
    save_checkpoint(model, tmp_path / "again", 30_000, model_type="phi-msft")
    expected, found = dict(read_tensors(source)), dict(read_tensors(tmp_path / "again"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == dtype for name in expected)
    again = load_model(tmp_path / "again", dtype)
    assert again.config == model.config
    save_checkpoint(model, tmp_path / "new")
    reference = PhiForCausalLM.from_pretrained(tmp_path / "new").float()
    torch.testing.assert_close(
        load_model(source)(TOKENS), reference(TOKENS).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((145, 48), r"checkpoint \(145, 48\), model \(144, 48\)"),
        ((144, 47), r"checkpoint \(144, 47\), model \(144, 48\)"),
        ((48, 144), r"checkpoint \(48, 144\), model \(144, 48\)"),
        ((144,), r"checkpoint \(144,\), model \(144, 48\)"),
        ((), r"checkpoint \(\), model \(144, 48\)"),
    ],
)
def test_a_fused_tensor_of_another_shape_is_named_once(tmp_path, shape, message):
    write_old(tmp_path, small_phi())
    change(tmp_path, FUSED, torch.zeros(shape))
    with pytest.raises(TensorMismatch, match=message) as caught:
        load_model(tmp_path)
    (mismatch,) = caught.value.mismatched
    assert mismatch.name == "blocks.1.attention.qkv_proj.weight"
    assert not caught.value.missing
    assert not caught.value.unexpected


def test_a_missing_fused_tensor_leaves_three_holes(tmp_path):
    write_old(tmp_path, small_phi())
    change(tmp_path, FUSED)
    with pytest.raises(TensorMismatch) as caught:
        load_model(tmp_path)
    stem = "blocks.1.attention.{}_proj.weight"
    assert caught.value.missing == [stem.format(x) for x in "qkv"]


def test_a_fused_tensor_of_whole_numbers(tmp_path):
    write_old(tmp_path, small_phi())
    change(tmp_path, FUSED, torch.ones(144, 48, dtype=torch.int8))
    with pytest.raises(TensorMismatch, match=r"dtype of blocks\.1\.attention\.q_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.3.mixer.Wqkv.weight",  # a layer too many
        "blocks.9.attention.qkv_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_what_is_no_part_of_the_model_is_unexpected(tmp_path, name):
    write_old(tmp_path, small_phi())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = torch.zeros(144, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TensorMismatch) as caught:
        load_model(tmp_path)
    assert caught.value.unexpected == [name]
    assert not caught.value.missing


@pytest.mark.parametrize("rows", [144, 145])
def test_a_part_beside_the_whole_is_refused(tmp_path, rows):
    write_old(tmp_path, small_phi())
    change(tmp_path, FUSED, torch.zeros(rows, 48))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.1.attention.k_proj.weight"] = torch.zeros(48, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="second tensor for a part of"):
        load_model(tmp_path)


def test_parts_have_memory_of_their_own(tmp_path):
    model = load_model(write_old(tmp_path, small_phi().half()), torch.float16)
    for part in model.blocks[0].attention.children():
        assert part.weight.untyped_storage().nbytes() == part.weight.nbytes


def test_the_real_sizes():
    words = {
        **WORDS, "vocab_size": 51_200, "n_layer": 32, "n_embd": 2560, "n_head": 32,
        "n_inner": None, "n_positions": 2048, "rotary_dim": 32,
        "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    assert read_phi_msft(words) == PHI_2
    assert read_phi_msft(write_phi_msft(PHI_2)) == PHI_2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"n_embd": 0}, "n_embd is 0, not a whole number"),
        ({"n_head": 5}, "5 heads do not divide width 48"),
        ({"n_head_kv": 4}, r"\(4\) must divide num_heads \(6\)"),
        ({"rotary_dim": 10}, "from 2 to the 8 features of a head, got 10"),
        ({"rotary_dim": 3}, "must be even, .* got 3"),
        ({"activation_function": "relu"}, "activation_function is 'relu', Phi has"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, not a number above 0"),
    ],
)
def test_words_that_ask_for_another_model(tmp_path, words, message):
    write_old(tmp_path, small_phi(), **words)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("word", ["n_layer", "n_head", "rotary_dim", "n_positions"])
def test_a_word_that_is_missing(tmp_path, word):
    write_old(tmp_path, small_phi())
    config = {key: value for key, value in WORDS.items() if key != word}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json has no '{word}'"):
        load_model(tmp_path)


def meta_tensors(model):
    """Our Llama's tensors as Meta names them, pairs of features side by side."""
    state, names = model.state_dict(), names_by_layer(model, META_LLAMA_NAMES)
    heads = {"wq": model.config.num_heads, "wk": model.config.num_kv_heads}
    for theirs, ours in names.items():
        tensor, count = state[ours], heads.get(theirs.split(".")[-2])
        if count:
            by_head = tensor.unflatten(0, (count, -1)).transpose(1, 2)
            tensor = half_split_to_interleaved(by_head).transpose(1, 2).flatten(0, 1)
        yield theirs, tensor


def test_metas_names_are_those_that_llama_cpp_knows():
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    for ours, theirs in META_LLAMA_NAMES.items():
        name, kind = theirs.format(5).rsplit(".", 1)
        hf = {"attention_norm": "attn_norm", "q_proj": "attn_q"}
        found = known.get_name(name)
        assert found, name
        for word, there in hf.items():
            if f".{word}.{kind}" in ours:
                assert found == f"blk.5.{there}"


def test_metas_llama_is_ours_with_rows_turned(monkeypatch):
    torch.manual_seed(2)
    source, target = Llama(tiny_config()), Llama(tiny_config())
    names = names_by_layer(target, META_LLAMA_NAMES)
    stored = list(meta_tensors(source))
    assert {name for name, _ in stored} == set(names)
    turned = turn_meta_rows(rename(stored, names), target.config)
    assign_strictly(target, turned, torch.float32)
    for name, weight in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], weight), name
    with torch.no_grad():
        expected = source(TOKENS[:, :8] % 96)
    # Not turned, and rotated as Meta rotates: the same model again.
    assign_strictly(target, rename(stored, names), torch.float32)
    with torch.no_grad():
        assert (target(TOKENS[:, :8] % 96) - expected).abs().max() > 1e-3
        path = "annotated_src.models.llama.apply_rotary"
        monkeypatch.setattr(path, apply_rotary_interleaved)
        torch.testing.assert_close(target(TOKENS[:, :8] % 96), expected)


def test_rows_that_are_not_the_heads_are_refused():
    tensors = [("blocks.0.attention.k_proj.weight", torch.zeros(21, 48))]
    message = r"blocks\.0\.attention\.k_proj\.weight has 21 rows, .* 2 heads of 10"
    with pytest.raises(ValueError, match=message):
        dict(turn_meta_rows(tensors, tiny_config()))


def test_a_fused_tensor_is_let_go_before_the_next_is_read():
    """Only the parts stay: no view keeps the memory of what they were cut from."""
    with torch.device("meta"):
        model = Phi(read_phi_msft(WORDS))
    alive = []

    def read():
        for layer in range(3):
            array = np.ones((144, 48), np.float32)
            alive.append(weakref.ref(array))
            tensor = torch.from_numpy(array)
            del array
            yield f"blocks.{layer}.attention.qkv_proj.weight", tensor
            del tensor
            assert alive[-1]() is None

    parts = split_fused(read(), model, "plain", {})
    assert sum(tuple(part.shape) == (48, 48) for _, part in parts) == 9
