"""A saved model comes back bit for bit, here and in transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from annotated_src import checkpoint, saving
from annotated_src.chatglm_quantize import quantize_linears
from annotated_src.checkpoint import load_model
from annotated_src.golden import golden, golden_config
from annotated_src.hf_config import write_gemma, write_llama, write_phi
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.models.gemma import GEMMA_2B, GEMMA_7B, GemmaConfig
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.models.phi import PHI_2, Phi, PhiConfig
from annotated_src.models.phi import tiny_config as tiny_phi
from annotated_src.rotary import Llama3Scaling
from annotated_src.saving import save_checkpoint, write_checkpoint
from annotated_src.shards import read_tensors

TOKENS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
STRETCHED = Llama3Scaling(8.0, 1.0, 4.0, 32)


def small(num_kv_heads=2, tied=False, dtype=torch.float32, **more):
    config = LlamaConfig(
        97, 3, 48, 6, num_kv_heads, 10, 80, 64, 1e-2, 500.0, tied, **more
    )
    model = Llama(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype)


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same_weights(found, model):
    found, expected = found.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


VARIANTS = {
    "multi-head": {"num_kv_heads": 6},
    "grouped": {},
    "multi-query": {"num_kv_heads": 1},
    "tied": {"tied": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "rope scaling": {"rope_scaling": STRETCHED, "tied": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("max_bytes", [5 * 10**9, 30_000])
def test_it_comes_back_bit_for_bit(tmp_path, variant, dtype, max_bytes):
    model = small(dtype=dtype, **variant)
    save_checkpoint(model, tmp_path, max_bytes)
    found = load_model(tmp_path, dtype)
    assert found.config == model.config
    assert_same_weights(found, model)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(theirs, LlamaForCausalLM)
    assert theirs.dtype == dtype
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_model(tmp_path / "theirs", dtype), model)
    if dtype == torch.float32:
        expected = theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_config_says_what_transformers_writes(tmp_path, variant):
    model = small(**variant)
    save_checkpoint(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text("utf-8"))
    assert LlamaConfig.from_hf(written) == model.config
    assert LlamaConfig.from_hf(write_llama(model.config)) == model.config
    assert written["bos_token_id"] is written["eos_token_id"] is None


def test_transformers_stops_at_the_end_that_was_named(tmp_path):
    model = small()
    save_checkpoint(model, tmp_path / "endless")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "endless")
    given = {"attention_mask": torch.ones(1, 9), "max_new_tokens": 6}
    ids = theirs.generate(TOKENS[:1], do_sample=False, **given)
    assert ids.shape == (1, 15)
    third = int(ids[0, 11])
    assert third not in ids[0, 9:11]
    save_checkpoint(model, tmp_path / "ending", eos_id=third)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ending")
    ended = theirs.generate(TOKENS[:1], do_sample=False, **given)
    assert torch.equal(ended, ids[:, :12])


def test_shards_are_named_as_transformers_names_them(tmp_path):
    model = small(tied=True)
    save_checkpoint(model, tmp_path, 40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    places = index["weight_map"]
    shards = sorted(set(places.values()))
    count = len(shards)
    assert count > 2
    assert shards == [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    assert files(tmp_path) == sorted(
        ["config.json", "model.safetensors.index.json", *shards]
    )
    weights = model.state_dict().values()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights)
    assert "lm_head.weight" not in places
    for shard in shards:
        with safe_open(tmp_path / shard, framework="pt") as stored:
            inside = set(stored.keys())
            assert stored.metadata() == {"format": "pt"}
            size = sum(stored.get_tensor(name).nbytes for name in inside)
        assert inside == {name for name, file in places.items() if file == shard}
        assert size <= 40_000


def test_a_tensor_above_the_limit_has_a_shard_to_itself(tmp_path):
    save_checkpoint(small(), tmp_path, 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    places = index["weight_map"]
    assert len(set(places.values())) == len(places) == 3 * 9 + 3
    assert_same_weights(load_model(tmp_path), small_again(tmp_path))


def small_again(path):
    theirs = AutoModelForCausalLM.from_pretrained(path)
    theirs.save_pretrained(path / "again")
    return load_model(path / "again")


def test_exactly_the_limit_still_fits(tmp_path):
    weights = {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(1)}
    write_checkpoint(tmp_path, {}, weights, 80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    write_checkpoint(tmp_path, {}, weights, 84)
    assert files(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("limits", [(30_000, 10**9), (10**9, 30_000), (9000, 50_000)])
def test_nothing_of_an_earlier_save_is_left(tmp_path, limits):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors.bak").write_text("mine")
    save_checkpoint(small(), tmp_path, limits[0])
    newer = small(tied=True)
    save_checkpoint(newer, tmp_path, limits[1])
    assert_same_weights(load_model(tmp_path), newer)
    again = tmp_path / "again"
    save_checkpoint(newer, again, limits[1])
    own = ["tokenizer.json", "model.safetensors.bak", "again"]
    assert files(tmp_path) == sorted([*files(again), *own])


@pytest.mark.parametrize("max_bytes", [10**9, 30_000])
def test_a_disk_that_fills_up_leaves_the_earlier_save_alone(
    tmp_path, monkeypatch, max_bytes
):
    older = small()
    save_checkpoint(older, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = saving.save_file, []

    def fails_at_last(tensors, path, metadata):
        calls.append(path)
        real(tensors, path, metadata)
        if len(calls) == (3 if max_bytes < 10**9 else 1):
            raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", fails_at_last)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(small(tied=True), tmp_path, max_bytes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_move_that_breaks_off_leaves_a_folder_that_nobody_loads(
    tmp_path, monkeypatch, moved
):
    save_checkpoint(small(), tmp_path, 30_000)
    real, calls = saving.Path.replace, []

    def breaks_off(self, target):
        if len(calls) == moved:
            raise OSError("power cut")
        calls.append(target)
        return real(self, target)

    monkeypatch.setattr(saving.Path, "replace", breaks_off)
    with pytest.raises(OSError, match="power cut"):
        save_checkpoint(small(tied=True), tmp_path, 30_000)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_loaded_model_can_be_saved_over_its_own_files(tmp_path):
    model = small()
    save_checkpoint(model, tmp_path, 30_000)
    save_checkpoint(load_model(tmp_path), tmp_path, 50_000)
    assert_same_weights(load_model(tmp_path), model)


def test_what_is_not_laid_out_in_order_is_saved_in_order(tmp_path):
    weight = torch.randn(4, 6).T
    write_checkpoint(tmp_path, {}, {"w": weight})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert torch.equal(stored.get_tensor("w"), weight)


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "model"
    path.write_text("a letter")
    with pytest.raises(ValueError, match=r"model is a file, expected a directory"):
        save_checkpoint(small(), path)
    assert path.read_text() == "a letter"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match=f"1 or more, got {limit}"):
        save_checkpoint(small(), tmp_path / "new", limit)
    assert not (tmp_path / "new").exists()


def test_weights_without_numbers_are_refused(tmp_path):
    with torch.device("meta"):
        model = Llama(small().config)
    with pytest.raises(ValueError, match=r"no numbers to save in model\.embed_tokens"):
        save_checkpoint(model, tmp_path / "new")
    with pytest.raises(ValueError, match="no numbers to save in no tensors"):
        write_checkpoint(tmp_path / "new", {}, {})
    assert not (tmp_path / "new").exists()


def test_weights_of_several_dtypes_are_refused(tmp_path):
    model = small()
    model.norm.to(torch.float64)
    with pytest.raises(ValueError, match=r"\['float32', 'float64'\]"):
        save_checkpoint(model, tmp_path)
    assert not files(tmp_path)


def test_a_quantised_model_is_refused(tmp_path):
    model = quantize_linears(small(), 8)
    with pytest.raises(ValueError, match=r"no name in a checkpoint for .*scale"):
        save_checkpoint(model, tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [5 * 10**9, 30_000])
def test_gemma_and_phi_come_back_bit_for_bit(
    tmp_path, make_decoder, decoder_name, dtype, max_bytes
):
    made = make_decoder(decoder_name, dtype=dtype)
    model, kind = made.model, type(made.reference)
    save_checkpoint(model, tmp_path, max_bytes, eos_id=5)
    assert (max_bytes < 10**9) == (len(list(tmp_path.glob("*.safetensors"))) > 2)
    found = load_model(tmp_path, dtype)
    assert found.config == model.config
    assert_same_weights(found, model)
    stored, original = dict(read_tensors(tmp_path)), dict(read_tensors(made.path))
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert type(theirs) is kind
    assert theirs.dtype == dtype
    assert theirs.config.eos_token_id == 5
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs", dtype)
    assert again.config == model.config
    assert_same_weights(again, model)
    if dtype == torch.float32:
        expected = theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            expected, made.reference(TOKENS).logits, rtol=1e-4, atol=1e-4
        )


def test_every_part_of_a_head_that_turns_is_read_back():
    """config.json says a share; who reads it rounds down, transformers too."""
    wrong_share = []
    for head_dim in range(2, 513, 2):
        for turning in range(2, head_dim + 1, 2):
            config = replace(PHI_2, head_dim=head_dim, rotary_dim=turning)
            words = write_phi(config)
            assert int(head_dim * words["partial_rotary_factor"]) == turning
            wrong_share.append(int(head_dim * (turning / head_dim)) != turning)
    assert PhiConfig.from_hf(words) == config
    assert any(wrong_share)  # the plain quotient would not do


@pytest.mark.parametrize("config", [GEMMA_2B, GEMMA_7B])
def test_the_real_gemmas_in_words(config):
    assert GemmaConfig.from_hf(write_gemma(config)) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_word_embeddings": True},
        {"pre_seq_len": 4, "prefix_projection": True},
        {"position_encoding_2d": False, "pre_seq_len": 3},
    ],
)
def test_chatglm_comes_back_bit_for_bit(tmp_path, dtype, more):
    model = ChatGLM(ChatGLMConfig.from_hf(golden_config() | more)).to(dtype)
    save_checkpoint(model, tmp_path, 30_000, eos_id=7)
    found = load_model(tmp_path, dtype)
    assert found.config == model.config
    assert_same_weights(found, model)
    stored = set(dict(read_tensors(tmp_path)))
    if not more:  # the names of the original, as it stored them
        buffers = {name for name in golden("weights") if name.endswith("inv_freq")}
        assert stored == set(golden("weights")) - buffers


def test_other_models_and_forms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot save Linear, only ChatGLM, Gemma, Ll"):
        save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "new")
    with pytest.raises(ValueError, match="of Llama is one of llama, got 'phi-msft'"):
        save_checkpoint(small(), tmp_path / "new", model_type="phi-msft")
    narrow = Phi(replace(tiny_phi(), head_dim=10))
    with pytest.raises(ValueError, match=r"heads as wide as the model.* 4 heads of 10"):
        save_checkpoint(narrow, tmp_path / "new", model_type="phi-msft")
    assert not (tmp_path / "new").exists()


def test_it_is_one_function_under_both_names():
    assert checkpoint.save_checkpoint is save_checkpoint
