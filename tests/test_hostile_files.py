"""Files that are damaged, or made to do harm: an error, and nothing else happens."""

import json
import os
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from annotated_src.checkpoint import load_model
from annotated_src.config_json import read_config
from annotated_src.shards import CheckpointError, read_json, read_tensors

INDEX = "model.safetensors.index.json"
DEEP = 100_000


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    """A copy of a sharded checkpoint, to be damaged."""
    return shutil.copytree(make_checkpoint().path, tmp_path / "copy")


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


def point_to(folder, file):
    """Let the index say that the last tensor lies in this file."""
    weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    weight_map["model.norm.weight"] = file
    edit(folder / INDEX, weight_map=weight_map)


def refused(folder, message):
    """Both find the fault: the reader, and the loader, before a model is made."""
    with pytest.raises(CheckpointError, match=message):
        list(read_tensors(folder))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


# -- config.json


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize(
    "value", [0, -1, "48", 48.0, 1.5, True, [48], {}, 10**10, 10**400, float("nan")]
)
def test_an_odd_size(folder, key, value):
    edit(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json: {key} is ") as caught:
        load_model(folder)
    assert f"{value!r:.60}, not a whole number from 1 to" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_size_that_is_null(folder, key):
    edit(folder / "config.json", **{key: None})
    with pytest.raises(CheckpointError, match=f"config.json: {key} is None, not a wh"):
        load_model(folder)


def test_layers_beyond_any_model_are_not_built(folder):
    edit(folder / "config.json", num_hidden_layers=10**9)
    message = "num_hidden_layers is 1000000000, not a whole number from 1 to 1000$"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_the_widest_sizes_need_no_memory(folder):
    """They are allowed; the stored tensors do not fit, and that is the error."""
    wide = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
    sizes = dict.fromkeys(wide, 10**6)
    edit(folder / "config.json", head_dim=10**6, num_key_value_heads=1, **sizes)
    with pytest.raises(CheckpointError, match=r"model \(1000000, 1000000\)"):
        load_model(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0", "-1e-5", '"1e-5"', "true"])
def test_an_odd_epsilon(folder, value):
    """As text: NaN and Infinity are no JSON, and Python reads them all the same."""
    path = folder / "config.json"
    text = path.read_text("utf-8").replace('"rms_norm_eps": 0.01', "@", 1)
    path.write_text(text.replace("@", f'"rms_norm_eps": {value}'), "utf-8")
    with pytest.raises(
        CheckpointError, match=r"rms_norm_eps is .*, not a number above"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true"),
        ({"attention_bias": 1}, "attention_bias is 1, not true or false"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None, not a number"),
        ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta is '1e4', not a"),
        ({"rope_scaling": {"factor": float("inf")}}, "factor is inf, not a number"),
    ],
)
def test_an_odd_value(folder, entries, message):
    edit(folder / "config.json", **entries)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        load_model(folder)


@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"]
)
def test_a_key_that_is_not_there(folder, key):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config[key]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match=f"config.json: .* has no '{key}'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": 4}, r"\(2\) must divide num_heads|shape of"),
        ({"num_key_value_heads": 5}, r"num_kv_heads \(5\) must divide num_heads \(6\)"),
    ],
)
def test_heads_that_do_not_divide(folder, entries, message):
    edit(folder / "config.json", **entries)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(("opening", "close"), [("[", "]"), ('{"a":', "}")])
def test_json_nested_deep(folder, name, opening, close):
    (folder / name).write_text(opening * DEEP + "1" + close * DEEP, "utf-8")
    with pytest.raises(CheckpointError, match=f"{name}: maximum recursion depth"):
        load_model(folder)


# -- names and files


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "link to a folder"])
def test_a_shard_outside_the_directory(folder, kind):
    outside = folder.parent / "outside"
    outside.mkdir()
    save_file({"model.norm.weight": torch.ones(48)}, outside / "x.safetensors")
    (folder / "linked.safetensors").symlink_to(outside / "x.safetensors")
    (folder / "linked").symlink_to(outside)
    name = {
        "dots": "../outside/x.safetensors",
        "absolute": str(outside / "x.safetensors"),
        "link": "linked.safetensors",
        "link to a folder": "linked/x.safetensors",
    }[kind]
    point_to(folder, name)
    refused(folder, f"'{name}' leads out of the directory")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_json_file_outside_the_directory(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(CheckpointError, match=f"'{name}' leads out of the directory"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("zero\0byte", "'zero.x00byte': .*null byte"),
        ("x" * 5000, "'x{90,}: .*too long"),
        ("gone.safetensors", "not in .*: gone.safetensors"),
        ("sub/gone.bin", "not in .*: sub/gone.bin"),
        ("", "not a regular file"),
        (".", "not a regular file"),
        ("..", "'..' leads out of the directory"),
        ("\ud800", "surrogates not allowed|not in"),
        (None, "model.norm.weight' is in None, not a file"),
        (["x"], r"model.norm.weight' is in \['x'\], not a file"),
    ],
)
def test_a_shard_that_cannot_be(folder, file, message):
    point_to(folder, file)
    refused(folder, message)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_something_else_where_a_file_should_be(folder, name, make):
    """A pipe that nobody writes to would keep a reader waiting for ever."""
    if name == "model.safetensors":
        (folder / INDEX).unlink()
    else:
        (folder / name).unlink()
    make(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        load_model(folder)


def test_a_link_that_leads_to_itself(folder):
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    point_to(folder, "loop.safetensors")
    refused(folder, "not in .*: loop.safetensors")


@pytest.fixture
def ordinary_user():
    """Root may read what it forbids itself: act as nobody, if this is root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("which", ["config.json", INDEX, "shard", "the folder"])
def test_what_may_not_be_read(folder, which, request):
    for above in folder.parents:
        if (
            above.stat().st_uid == os.geteuid()
            and above.stat().st_mode & 0o777 == 0o700
        ):
            above.chmod(0o711)
    (shard, *_) = sorted(folder.glob("*.safetensors"))
    path = {"shard": shard, "the folder": folder}.get(which, folder / which)
    path.chmod(0)
    request.getfixturevalue("ordinary_user")
    with pytest.raises(CheckpointError, match=r"Permission denied|os error 13"):
        load_model(folder)


# -- safetensors


def tensor(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HALVES = {"a": tensor(shape=[8], offsets=[0, 32])}
HEADERS = {
    "an unknown dtype": {"a": tensor("F31")},
    "one that torch has not": {"a": tensor("F6_E2M3", [64], [0, 48])},
    "offsets that overlap": HALVES | {"b": tensor(shape=[12], offsets=[16, 64])},
    "the same bytes twice": HALVES | {"b": tensor(shape=[8], offsets=[0, 32])},
    "a hole": HALVES | {"b": tensor(shape=[4], offsets=[48, 64])},
    "offsets out of the file": {"a": tensor(shape=[32], offsets=[0, 128])},
    "offsets beyond the file": {"a": tensor(offsets=[64, 128])},
    "offsets backwards": {"a": tensor(offsets=[64, 0])},
    "offsets that are negative": {"a": tensor(offsets=[-64, 0])},
    "bytes left over": HALVES,
    "a shape too large": {"a": tensor(shape=[17])},
    "a shape that overflows": {"a": tensor(shape=[2**62, 4])},
    "a shape beyond 64 bits": {"a": tensor(shape=[0, 2**63], offsets=[0, 0])},
    "a shape that is negative": {"a": tensor(shape=[-16])},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 64]}},
    "no object": [tensor()],
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": tensor()},
}


def write(path, header, length=None, data=bytes(64)):
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)


@pytest.fixture
def single(folder):
    """Where the one file goes; index and shards are gone."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return folder / "model.safetensors"


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies(single, header):
    data = b"" if "beyond 64" in str(header) else bytes(64)
    text = json.dumps(header).encode()
    write(single, text, data=bytes(48) if b"F6" in text else data)
    refused(single.parent, r"model\.safetensors: ")


@pytest.mark.parametrize("length", [0, 1, 5, 2**20, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(single, length):
    write(single, json.dumps({"a": tensor()}).encode(), length)
    refused(single.parent, r"model\.safetensors: .*header")


@pytest.mark.parametrize("header", [b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b""])
def test_a_header_that_is_no_json(single, header):
    write(single, header)
    refused(single.parent, r"model\.safetensors: .*header")


@pytest.mark.parametrize("length", range(9))
def test_hardly_a_file(single, length):
    single.write_bytes(bytes(length))
    refused(single.parent, r"model\.safetensors: ")


# -- pickles


class Hostile:
    """Unpickled without care, it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"echo hello > '{self.target}'",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["value", "name", "all"])
def test_a_hostile_pickle_is_not_run(folder, zipped, place):
    target = folder / "written"
    hostile = Hostile(target)
    content = {
        "value": {"a": hostile},
        "name": {hostile: torch.ones(1)},
        "all": hostile,
    }
    save = {"_use_new_zipfile_serialization": zipped}
    torch.save(content[place], folder / "x.bin", **save)
    point_to(folder, "x.bin")
    refused(folder, r"x\.bin: ")
    assert not target.exists()
    torch.load(folder / "x.bin", weights_only=False)  # it would have worked
    assert target.read_text("utf-8") == "hello\n"


def test_a_pickle_under_another_name_is_not_read_as_one(single):
    target = single.parent / "written"
    torch.save({"a": Hostile(target)}, single)
    refused(single.parent, r"model\.safetensors: .*header")
    assert not target.exists()


# -- any byte


@pytest.fixture(scope="module")
def valid(make_checkpoint, tmp_path_factory):
    """The same weights as safetensors and as .bin, in shards and in one file each."""
    path, bins = make_checkpoint().path, tmp_path_factory.mktemp("valid")
    weight_map = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
    tensors = {name: x.clone() for name, x in read_tensors(path)}
    kinds = {"shards": path}
    for kind in ("one", "bins", "bin", "old bin"):
        kinds[kind] = bins / kind
        kinds[kind].mkdir()
        shutil.copy(path / "config.json", kinds[kind])
    save_file(tensors, kinds["one"] / "model.safetensors")
    torch.save(tensors, kinds["bin"] / "pytorch_model.bin")
    torch.save(
        tensors,
        kinds["old bin"] / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    for file in set(weight_map.values()):
        shard = {n: x for n, x in tensors.items() if weight_map[n] == file}
        torch.save(shard, kinds["bins"] / f"{file}.bin")
    where = {name: f"{file}.bin" for name, file in weight_map.items()}
    index = kinds["bins"] / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}), "utf-8")
    return {
        kind: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for kind, folder in kinds.items()
    }


def mutate(data, content, ends):
    """Flip a bit, overwrite, delete or insert a few bytes, or cut the end off."""
    for _ in range(data.draw(st.integers(1, 3), "mutations")):
        # Headers and pickles stand at the ends; numbers, that may be any, between.
        spot = data.draw(st.integers(0, max(len(content) - 1, 0)), "spot")
        if data.draw(st.booleans(), "near an end"):
            spot = spot % min(ends, len(content) or 1)
            spot = data.draw(st.sampled_from([spot, len(content) - 1 - spot]), "end")
        before, after = content[:spot], content[spot:]
        some = data.draw(st.binary(min_size=1, max_size=8), "bytes")
        kind = data.draw(st.sampled_from(["flip", "put", "cut", "insert", "end"]), "do")
        if kind == "flip" and after:
            content = before + bytes([after[0] ^ 1 << some[0] % 8]) + after[1:]
        elif kind == "put":
            content = before + some + after[len(some) :]
        elif kind == "cut":
            content = before + after[len(some) :]
        elif kind == "insert":
            content = before + some + after
        else:
            content = before
    return content


def load_mutated(valid, folder, data):
    """Load it, and say whether it went well; any other outcome is an exception."""
    kind = data.draw(st.sampled_from(sorted(valid)), "kind")
    name = data.draw(st.sampled_from(sorted(valid[kind])), "file")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, content in valid[kind].items():
        (folder / file).write_bytes(content)
    (folder / name).write_bytes(mutate(data, valid[kind][name], ends=1500))
    try:
        model = load_model(folder)
    except CheckpointError as error:
        assert str(error)  # noqa: PT017 - there is no more to say of it
        return False
    assert not any(weight.is_meta for weight in model.state_dict().values())
    return True


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_bytes_change_it_loads_or_says_why(valid, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mutated(valid, folder, data)


def test_without_a_change_every_kind_loads(valid, tmp_path):
    """So that the test before this one changes something that was right."""
    for kind, files in valid.items():
        folder = tmp_path / kind
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        assert read_config(folder) == read_json(folder / "config.json")
        load_model(folder)
