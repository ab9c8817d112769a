"""Files of the older kind; those of the newer one are in test_checkpoint.py."""

import json
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

from annotated_src.shards import CheckpointError, find_file, read_tensors, shard_paths

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2).half(), "c": torch.zeros(1)}


@pytest.fixture
def folder(tmp_path):
    """Two .bin files and their index."""
    torch.save({"a": TENSORS["a"], "c": TENSORS["c"]}, tmp_path / "one.bin")
    torch.save({"b": TENSORS["b"]}, tmp_path / "two.bin")
    weight_map = {"a": "one.bin", "b": "two.bin", "c": "one.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return tmp_path


def same(found, wanted):
    found = dict(found)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])


def test_bin_files_by_their_index(folder):
    assert [path.name for path in shard_paths(folder)] == ["one.bin", "two.bin"]
    same(read_tensors(folder), TENSORS)


def test_a_single_bin_file(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    same(read_tensors(tmp_path), TENSORS)


def test_safetensors_come_first(folder):
    save_file({"new": torch.ones(1)}, folder / "model.safetensors")
    same(read_tensors(folder), {"new": torch.ones(1)})


def test_only_some(folder):
    same(read_tensors(folder, only=["b", "nowhere"]), {"b": TENSORS["b"]})
    assert [p.name for p in shard_paths(folder, only=["b"])] == ["two.bin"]
    save_file(TENSORS, folder / "model.safetensors")
    same(read_tensors(folder, only=["a"]), {"a": TENSORS["a"]})


class Hostile:
    """Unpickled without care, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    target = tmp_path / "made by the pickle"
    torch.save({"a": Hostile(target)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        list(read_tensors(tmp_path))
    assert not target.exists()


@pytest.mark.parametrize("part", [0, 0.3, 0.9, 0.99])
def test_a_truncated_file(tmp_path, part):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds list, not a dict"),
        ({"a": torch.ones(1), "step": 3}, "'step' does not name a plain tensor"),
        ({"a": torch.ones(2, device="meta")}, "'a' does not name a plain tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' does not name a plain tensor"),
        ({7: torch.ones(1)}, "7 does not name a plain tensor"),
    ],
)
def test_a_file_with_something_else_in_it(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        list(read_tensors(tmp_path))


def test_nothing_there(tmp_path):
    message = r"not in .*: model\.safetensors or pytorch_model\.bin"
    with pytest.raises(FileNotFoundError, match=message):
        list(read_tensors(tmp_path))


def test_progress_after_each_shard(folder):
    seen = []
    for name, _ in read_tensors(folder, progress=lambda *now: seen.append(now)):
        seen.append(name)
    assert seen == ["a", "c", (1, 2), "b", (2, 2)]


def test_the_reader_keeps_no_tensor(folder):
    """Not even in the file's dict: memory falls while a shard is used up."""
    tensors, weak = read_tensors(folder), []
    for _, tensor in tensors:
        weak.append(weakref.ref(tensor))
        del tensor
        assert [ref() is not None for ref in weak].count(True) <= 1
    assert len(weak) == 3


def test_a_hub_cache_links_to_its_blobs(folder, tmp_path_factory):
    """The layout of huggingface_hub: snapshots/<commit>/name -> ../../blobs/<hash>."""
    repository = tmp_path_factory.mktemp("hub") / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, repository / "blobs" / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    same(read_tensors(snapshot), TENSORS)
    assert find_file(snapshot, "one.bin") == snapshot / "one.bin"
    (repository / "elsewhere").write_text("", "utf-8")
    (snapshot / "out").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match="'out' leads out of the directory"):
        find_file(snapshot, "out")


def test_links_inside_the_directory_are_followed(folder):
    (folder / "data").mkdir()
    (folder / "one.bin").rename(folder / "data" / "1")
    (folder / "one.bin").symlink_to("data/1")
    same(read_tensors(folder), TENSORS)
    folder.with_name("link").symlink_to(folder)  # the directory itself, too
    same(read_tensors(folder.with_name("link")), TENSORS)
