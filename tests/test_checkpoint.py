import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from annotated_src.architectures import WithoutInit
from annotated_src.checkpoint import (
    TensorMismatch,
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.golden import golden_config
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.models.gemma import Gemma
from annotated_src.models.gemma import tiny_config as gemma_config
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.models.llama import tiny_config as llama_config
from annotated_src.models.phi import Phi
from annotated_src.models.phi import tiny_config as phi_config
from annotated_src.saving import save_checkpoint
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


@pytest.mark.parametrize("stored", ["one", "equal", "different"])
def test_a_tied_head_stored_beside_the_embedding(make_checkpoint, tmp_path, stored):
    """As transformers 5: one matrix, unless two different ones are stored."""
    folder = shutil.copytree(make_checkpoint(tied=True).path, tmp_path / "copy")
    tokens, embedding = torch.arange(10)[None], "model.embed_tokens.weight"
    if stored != "one":
        head = dict(read_tensors(folder))[embedding].clone()
        head[5] += stored == "different"
        save_file({"lm_head.weight": head}, folder / "more.safetensors")
        index = json.loads((folder / INDEX).read_text("utf-8"))
        index["weight_map"]["lm_head.weight"] = "more.safetensors"
        (folder / INDEX).write_text(json.dumps(index), "utf-8")
    reference, found = LlamaForCausalLM.from_pretrained(folder), load_model(folder)
    tied = reference.lm_head.weight is reference.model.embed_tokens.weight
    assert found.config.tied_head == tied == (stored != "different")
    assert hasattr(found, "lm_head") != tied
    torch.testing.assert_close(found(tokens), reference(tokens).logits)


def test_the_frequencies_in_old_checkpoints_are_ignored(folder, make_checkpoint):
    norm = "model.layers.1.input_layernorm.weight"
    kept = dict(read_tensors(folder, only=[norm]))
    old = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change(folder, norm, **kept, **{old: torch.zeros(5)})
    tokens = torch.arange(10)[None]
    assert torch.equal(load_model(folder)(tokens), make_checkpoint().model(tokens))
    change(folder, norm, **kept, **{old + "s": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"unexpected: .*inv_freqs"):
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
    with pytest.raises(TensorMismatch) as caught:
        assign_strictly(model, tensors, torch.float32)
    assert caught.value.missing == ["blocks.1.ffn.gate_proj.weight"]
    assert caught.value.unexpected == ["surplus"]
    assert caught.value.mismatched == [("lm_head.weight", "shape", (96, 48), (97, 48))]
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
    with pytest.raises(CheckpointError, match=f"index.json: {message}"):
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


@pytest.mark.parametrize("kind", ["mamba", 3, ["llama"], {}])
def test_an_unknown_model_type(folder, kind):
    edit(folder / "config.json", model_type=kind)
    with pytest.raises(CheckpointError, match=r"model_type is .*; known are llama"):
        load_model(folder)


@pytest.mark.parametrize("classes", [None, [], "LlamaForCausalLM", [["x"]], ["Mamba"]])
def test_without_model_type_the_architecture_counts(folder, make_checkpoint, classes):
    edit(folder / "config.json", model_type=None)
    tokens = torch.arange(10)[None]
    assert torch.equal(load_model(folder)(tokens), make_checkpoint().model(tokens))
    edit(folder / "config.json", architectures=classes)
    with pytest.raises(CheckpointError, match=r"architectures .*; known are llama"):
        load_model(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_key_value_heads": 4}, r"\(4\) must divide num_heads \(6\)"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
        ({"num_attention_heads": 5}, r"\(2\) must divide num_heads \(5\)"),
        ({"attention_bias": True}, r"missing: .*q_proj\.bias"),
    ],
)
def test_a_config_that_asks_for_another_model(folder, entries, message):
    edit(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_second_tensor_for_a_name_is_refused():
    """The same tensor in two shards."""
    name = "model.norm.weight"
    tensors = [(name, torch.ones(2)), (name, torch.zeros(2))]
    with pytest.raises(CheckpointError, match=f"second tensor for norm.weight: {name}"):
        dict(rename(tensors, {name: "norm.weight"}))


def test_a_tensor_that_has_our_name_in_the_files_is_refused():
    """Alone it would fit; but then the files are not what config.json says."""
    with pytest.raises(CheckpointError, match=r"norm\.weight should be model\.norm\.w"):
        dict(
            rename(
                [("norm.weight", torch.ones(2))], {"model.norm.weight": "norm.weight"}
            )
        )


def test_a_loaded_model_does_not_lean_on_its_file(folder):
    model = load_model(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:  # in place, as a copy over it would
            file.write(bytes(size))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(80, 48, dtype=torch.int64),
        torch.ones(80, 48, dtype=torch.bool),
        torch.ones(80, 48, dtype=torch.complex64),
        torch.ones(80, 48).to(torch.float8_e4m3fn),  # its scale would be missing
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_what_is_not_a_float_is_no_weight(folder, tensor):
    change(folder, GATE, **{GATE: tensor})
    ours = "blocks.1.ffn.gate_proj.weight"
    message = f"dtype of {ours}: checkpoint {tensor.dtype}, model torch.float32"
    with pytest.raises(TensorMismatch, match=message) as caught:
        load_model(folder)
    different = (ours, "dtype", tensor.dtype, torch.float32)
    assert caught.value.mismatched == [different]
    assert not caught.value.missing


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_is_cast_once(folder, stored, dtype):
    weight = torch.randn(80, 48, dtype=torch.float64).to(stored)
    change(folder, GATE, **{GATE: weight})
    model = load_model(folder, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.blocks[1].ffn.gate_proj.weight, weight.to(dtype))


def test_parameters_and_views_in_a_bin_file(folder, make_checkpoint):
    """What people save: parameters that require gradients, transposed views."""
    tensors = {name: nn.Parameter(x.clone()) for name, x in read_tensors(folder)}
    tensors[GATE] = tensors[GATE].detach().T.contiguous().T
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    norm, gains = "model.norm.weight", torch.zeros(10 * 48)
    gains[48:96] = tensors[norm].detach()
    tensors[norm] = gains[48:96]  # in the file, all of gains is stored
    torch.save(tensors, folder / "pytorch_model.bin")
    found, tokens = load_model(folder), torch.arange(10)[None]
    assert torch.equal(found(tokens), make_checkpoint().model(tokens))
    for weight in found.parameters():
        assert weight.is_leaf
        assert weight.is_contiguous() or weight.t().is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_matrices_stored_as_one_are_two_in_the_model(folder):
    """A .bin file keeps what was shared, here two projections that are equal."""
    tensors = {name: x.clone() for name, x in read_tensors(folder)}
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    up = GATE.replace("gate", "up")
    tensors[up] = tensors[GATE]
    torch.save(tensors, folder / "pytorch_model.bin")
    ffn = load_model(folder).blocks[1].ffn
    assert torch.equal(ffn.up_proj.weight, ffn.gate_proj.weight)
    with torch.no_grad():
        ffn.up_proj.weight.zero_()
    assert torch.equal(ffn.gate_proj.weight, tensors[GATE])


def test_what_somebody_holds_is_copied_unless_given_away(model):
    mine = {
        name: weight.detach().clone() for name, weight in model.state_dict().items()
    }
    assign_strictly(model, mine.items(), torch.float32)
    assert not any(
        w.data_ptr() == mine[n].data_ptr() for n, w in model.named_parameters()
    )
    assign_strictly(model, mine.items(), torch.float32, copy=False)
    assert all(w.data_ptr() == mine[n].data_ptr() for n, w in model.named_parameters())


def test_progress_over_the_shards(folder):
    seen, total = [], len(shard_paths(folder))
    load_model(folder, progress=lambda *now: seen.append(now))
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_is_none_for_weights(folder, dtype):
    with pytest.raises(ValueError, match=f"must be one of .*, got {dtype}"):
        load_model(folder, dtype)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(ValueError, match=f"device '{device}': "):
        load_model(folder, device=device)


def test_the_device_gets_the_model(folder):
    """The meta device is the other one that every machine has."""
    model = load_model(folder, torch.float16, device="meta")
    assert {(w.device.type, w.dtype) for w in model.parameters()} == {
        ("meta", torch.float16)
    }


def test_without_init_no_number_is_drawn():
    before = torch.get_rng_state()
    with WithoutInit():
        layers = nn.Linear(3, 4), nn.Embedding(3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.weight.shape for layer in layers] == [(4, 3), (3, 4)]
    nn.Embedding(3, 4)
    assert not torch.equal(torch.get_rng_state(), before)


MEASURE = """
import sys
from pathlib import Path
import torch
from annotated_src.architectures import WithoutInit
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.shards import read_json, read_tensors

def memory(kind):
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(kind)]
    return 1024 * int(line.split()[1])

def all_first(path, dtype):
    config = LlamaConfig.from_hf(read_json(path / "config.json"))
    with torch.device("meta"), WithoutInit():
        model = Llama(config)
    found, names = dict(read_tensors(path)), names_by_layer(model, HF_NAMES)
    copies = {names[name]: x.to(dtype, copy=True) for name, x in found.items()}
    model.load_state_dict(copies, assign=True)

path, dtype, load = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = memory("VmHWM")
{"load_model": load_model, "all_first": all_first}[load](path, dtype)
sys.stdout.write(str(memory("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A Llama of 186 MB in float32, in 5 shards of each kind."""
    config = {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    model, sizes = Llama(LlamaConfig.from_hf(config)), set()
    names, weights = names_by_layer(model, HF_NAMES), model.state_dict()
    stored = {theirs: weights[ours] for theirs, ours in names.items()}
    path = tmp_path_factory.mktemp("big")
    for suffix, save, index in (
        ("safetensors", save_file, "model.safetensors"),
        ("bin", torch.save, "pytorch_model.bin"),
    ):
        folder, shards = path / suffix, [{} for _ in range(5)]
        folder.mkdir()
        for name, weight in stored.items():
            smallest = min(shards, key=lambda s: sum(w.nbytes for w in s.values()))
            smallest[name] = weight
        for i, shard in enumerate(shards):
            save(shard, folder / f"{i}.{suffix}")
            sizes.add((folder / f"{i}.{suffix}").stat().st_size)
        where = {n: f"{i}.{suffix}" for i, shard in enumerate(shards) for n in shard}
        content = json.dumps({"weight_map": where})
        (folder / f"{index}.index.json").write_text(content, "utf-8")
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    widths = [weight.nbytes for weight in stored.values()]
    return path, sum(widths), {"safetensors": max(widths), "bin": max(sizes)}


@pytest.mark.skipif(sys.platform != "linux", reason="read as Linux tells it, in /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_stays_near_one_copy(big, suffix, dtype):
    """As the system counts it, in a process of its own.

    Beside the copy, one tensor of a safetensors file; of the other kind, one shard.
    """
    path, total, beside = big
    copy, slack = total * dtype.itemsize // 4, 24e6
    assert total > 3 * beside[suffix]

    def peak(load):
        arguments = [str(path / suffix), str(dtype).removeprefix("torch."), load]
        command = [sys.executable, "-c", MEASURE, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True).stdout)

    assert 0.9 * copy < peak("load_model") < copy + beside[suffix] + slack
    if dtype == torch.float16:  # the same measurement tells a wasteful way
        assert peak("all_first") > copy + 2 * beside[suffix] + slack


def test_matrices_lie_by_columns_and_are_the_same(make_checkpoint):
    """Those of linear layers in float32; the embedding is looked up by rows."""
    model = make_checkpoint().model
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(linears) == 3 * 7 + 1
    assert all(part.weight.t().is_contiguous() for part in linears)
    assert all(part.weight.is_leaf and part.weight.requires_grad for part in linears)
    assert model.embedding.weight.is_contiguous()
    half = load_model(make_checkpoint().path, torch.bfloat16)
    assert half.blocks[0].attention.q_proj.weight.is_contiguous()


# A tensor of each architecture's files, a second one of the same shape, and another
# name for the first: its layer, or what it is, does not exist.
PAIRS = {
    "llama": ("model.layers.1.self_attn.k_proj.weight", "k_proj", "v_proj"),
    "gemma": ("model.layers.1.mlp.gate_proj.weight", "gate", "up"),
    "phi": ("model.layers.1.self_attn.k_proj.bias", "k_proj", "v_proj"),
    "phi-msft": ("transformer.h.1.mixer.Wqkv.weight", "h.1", "h.0"),
    "chatglm": (
        "transformer.layers.1.attention.query_key_value.bias",
        "layers.1",
        "layers.0",
    ),
}


SMALL = {
    "llama": lambda: Llama(llama_config()),
    "gemma": lambda: Gemma(gemma_config()),
    "phi": lambda: Phi(phi_config()),
    "chatglm": lambda: ChatGLM(ChatGLMConfig.from_hf(golden_config())),
}


@pytest.fixture(params=PAIRS)
def stored(request, tmp_path):
    """A checkpoint of each architecture: its folder, its tensors, and its pair."""
    kind = request.param.removesuffix("-msft")
    torch.manual_seed(4)
    model = SMALL[kind]()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    save_checkpoint(model, tmp_path, 20_000, model_type=request.param)
    tensors = dict(read_tensors(tmp_path))
    for path in (*tmp_path.glob("*.safetensors"), tmp_path / INDEX):
        path.unlink()
    name, old, new = PAIRS[request.param]
    return tmp_path, tensors, name, name.replace(old, new)


def load_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return load_model(folder)


def test_each_model_wants_exactly_its_tensors(stored):
    folder, tensors, name, _ = stored
    load_tensors(folder, tensors)
    for less in tensors:
        rest = {key: tensor for key, tensor in tensors.items() if key != less}
        with pytest.raises(TensorMismatch) as caught:
            load_tensors(folder, rest)
        assert len(caught.value.missing) == (3 if "Wqkv" in less else 1)
        assert not caught.value.unexpected
        assert not caught.value.mismatched
    for more in (name + "s", name.replace("1", "7"), "surplus"):
        with pytest.raises(TensorMismatch) as caught:
            load_tensors(folder, tensors | {more: torch.zeros(1)})
        assert caught.value.unexpected == [more]
        assert not caught.value.missing


def test_each_model_wants_exactly_their_shapes(stored):
    folder, tensors, _, _ = stored
    for name, tensor in tensors.items():
        for wrong in (tensor[:-1], tensor[None], tensor.t()):
            wrong = wrong.contiguous().clone()
            if wrong.shape == tensor.shape:
                continue
            with pytest.raises(TensorMismatch) as caught:
                load_tensors(folder, tensors | {name: wrong})
            (mismatch,) = caught.value.mismatched
            assert mismatch.checkpoint == tuple(wrong.shape)
            assert mismatch.model == tuple(tensor.shape)
            assert not caught.value.missing
            assert not caught.value.unexpected


def test_each_model_refuses_a_tensor_in_two_shards(stored):
    folder, tensors, name, _ = stored
    save_file(tensors, folder / "a.safetensors")
    save_file({name: tensors[name]}, folder / "b.safetensors")
    places = {**dict.fromkeys(tensors, "a.safetensors"), "x": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="second tensor for"):
        load_model(folder)


def test_two_that_are_swapped_are_noticed_by_the_numbers_alone(stored):
    """Equal shapes: no strictness can tell. What the model computes does."""
    folder, tensors, name, other = stored
    expected = load_tensors(folder, tensors)
    swapped = {**tensors, name: tensors[other], other: tensors[name]}
    found = load_tensors(folder, {key: x.clone() for key, x in swapped.items()})
    tokens = torch.tensor([[5, 9, 17, 3, 2]])
    if isinstance(expected, ChatGLM):
        blanks = expected.config.blank_ids
        tokens = torch.tensor([[5, 9, blanks.gmask, blanks.sop, 3]])
    assert (found(tokens) - expected(tokens)).abs().max() > 0.01
