import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from annotated_src.checkpoint import (
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.models.llama import HF_NAMES, Llama
from annotated_src.shards import CheckpointError, read_tensors, shard_paths

INDEX = "model.safetensors.index.json"

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    """A copy of a sharded checkpoint, to be damaged."""
    return shutil.copytree(make_checkpoint().path, tmp_path / "copy")


@pytest.fixture
def model(make_checkpoint):
    """Random weights, other than the checkpoint's."""
    return Llama(make_checkpoint().model.config)


def shard_of(folder, name):
    index = json.loads((folder / INDEX).read_text("utf-8"))
    return folder / index["weight_map"][name]


def change(folder, name, **tensors):
    """Rewrite the shard that holds a tensor: without it, with the tensors given."""
    path = shard_of(folder, name)
    kept = {key: value for key, value in load_file(path).items() if key != name}
    save_file(kept | tensors, path, {"format": "pt"})


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


def test_every_tensor_arrives_where_it_belongs(checkpoint):
    theirs, ours = checkpoint.reference.state_dict(), checkpoint.model.state_dict()
    if checkpoint.reference.config.tie_word_embeddings:
        del theirs["lm_head.weight"]  # transformers lists it, and does not store it
    assert len(ours) == len(theirs)
    for name, where in names_by_layer(checkpoint.model, HF_NAMES).items():
        assert torch.equal(ours[where], theirs[name])


def test_one_file_reads_like_many(folder, make_checkpoint):
    save_file(dict(read_tensors(folder)), folder / "model.safetensors")
    for shard in shard_paths(folder):
        shard.unlink()
    (folder / INDEX).unlink()
    found, expected = load_model(folder), make_checkpoint().model
    tokens = torch.arange(10)[None]
    assert torch.equal(found(tokens), expected(tokens))


def test_the_model_comes_ready_to_run(folder):
    model = load_model(str(folder))
    assert not model.training
    assert not any(weight.is_meta for weight in model.state_dict().values())


def test_a_missing_tensor(folder):
    change(folder, GATE)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.ffn\.gate_proj"):
        load_model(folder)


def test_an_unexpected_tensor(folder):
    change(folder, GATE, surplus=torch.zeros(2))
    with pytest.raises(CheckpointError, match="unexpected: surplus"):
        load_model(folder)


def test_a_layer_too_many(folder):
    edit(folder / "config.json", num_hidden_layers=2)
    message = r"unexpected: model\.layers\.2\.mlp\.gate_proj\.weight"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_head_that_should_have_been_tied(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight"):
        load_model(folder)


def test_a_tensor_of_another_shape(folder):
    change(folder, GATE, **{GATE: torch.zeros(48, 80)})
    message = r"gate_proj\.weight: checkpoint \(48, 80\), model \(80, 48\)"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_all_problems_at_once_and_the_model_as_it_was(model, folder):
    change(folder, GATE, surplus=torch.zeros(2))
    change(folder, "lm_head.weight", **{"lm_head.weight": torch.zeros(96, 48)})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    bytes_before = {p.name: p.read_bytes() for p in folder.iterdir()}
    tensors = rename(read_tensors(folder), names_by_layer(model, HF_NAMES))
    with pytest.raises(CheckpointError) as caught:
        assign_strictly(model, tensors, torch.float32)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  missing: blocks.1.ffn.gate_proj.weight",
        "  shape of lm_head.weight: checkpoint (96, 48), model (97, 48)",
        "  unexpected: surplus",
    ]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == bytes_before


def test_a_missing_shard_is_named(folder):
    shards = shard_paths(folder)
    shards[0].unlink()
    shards[2].unlink()
    message = f"not in {folder}: {shards[0].name}, {shards[2].name}"
    with pytest.raises(FileNotFoundError, match=message):
        load_model(folder)


def test_no_weights_at_all(folder):
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"not in .*: model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999])
def test_a_truncated_shard(folder, part):
    path = shard_of(folder, GATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=path.name):
        load_model(folder)


def test_a_shard_that_is_something_else(folder):
    path = shard_of(folder, GATE)
    path.write_bytes(b"GGUF" * 100)
    with pytest.raises(CheckpointError, match=path.name):
        load_model(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_files(folder, index):
    (folder / INDEX).write_text(index, "utf-8")
    with pytest.raises(CheckpointError, match=r"weight_map is .*, not an object"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama",', "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "decode"),
        (b"[1, 2]", "holds list, not an object"),
    ],
)
def test_damaged_json(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["mamba", None, 3, ["llama"]])
def test_an_unknown_model_type(folder, kind):
    edit(folder / "config.json", model_type=kind)
    with pytest.raises(CheckpointError, match=r"model_type is .*, known are llama"):
        load_model(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_key_value_heads": 4}, r"\(4\) must divide num_heads \(6\)"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
        ({"attention_bias": True}, "True"),
    ],
)
def test_a_config_that_asks_for_another_model(folder, entries, message):
    edit(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*nowhere"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.norm.weight", "norm.weight"])
def test_a_second_tensor_for_a_name_is_refused(name):
    """The same tensor in two shards, or one that has our name already."""
    names = {"model.norm.weight": "norm.weight"}
    tensors = [("model.norm.weight", torch.ones(2)), (name, torch.zeros(2))]
    with pytest.raises(CheckpointError, match=f"second tensor for norm.weight: {name}"):
        dict(rename(tensors, names))


def test_a_loaded_model_does_not_lean_on_its_file(folder):
    model = load_model(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:  # in place, as a copy over it would
            file.write(bytes(size))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
