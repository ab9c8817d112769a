"""The account of memory, and the pictures of it."""

import json

import pytest
import torch
from torch import nn

from annotated_src.architectures import WithoutInit
from annotated_src.checkpoint import (
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.figures.from_pretrained import (
    Ledger,
    MemoryData,
    draw_memory,
    memory_data,
    peak_by_formula,
)
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.shards import read_tensors, shard_paths


def alive(ledger):
    ledger.write()
    return sum(ledger.sizes[number] for number in ledger.pages[-1][1])


def test_the_ledger_counts_what_lives():
    with Ledger() as ledger:
        a = torch.zeros(10)
        assert alive(ledger) == 40
        b = a * 2
        assert alive(ledger) == 80
        del a
        assert alive(ledger) == 40
        b = b.half()
        assert alive(ledger) == 20
        del b
        assert alive(ledger) == 0


def test_views_share_their_storage_and_write_no_page():
    with Ledger() as ledger:
        a = torch.zeros(6, 2)
        pages = len(ledger.pages)
        views = a[2:], a.T, a.detach(), a.view(3, 4)
        assert len(ledger.pages) == pages
        assert alive(ledger) == 48
        del a
        assert alive(ledger) == 48
        del views
        assert alive(ledger) == 0


def test_the_meta_device_holds_nothing():
    with Ledger() as ledger, torch.device("meta"):
        layer = nn.Linear(1000, 1000)
        assert alive(ledger) == 0
    assert layer.weight.nbytes == 4_000_000


def test_a_tensor_from_elsewhere_is_entered_once():
    before = torch.zeros(5)
    with Ledger() as ledger:
        before.add_(1)
        before.mul_(2)
        assert alive(ledger) == 20
    assert ledger.enter(before) == ledger.enter(before[1:]) == 0


@pytest.fixture
def folder(tmp_path):
    """Three shards of a Llama whose tensors differ much in size, as pickles."""
    config = {
        "model_type": "llama",
        "vocab_size": 200,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    model = Llama(LlamaConfig.from_hf(config))
    theirs = {b: a for a, b in names_by_layer(model, HF_NAMES).items()}
    stored = {theirs[name]: w.clone() for name, w in model.state_dict().items()}
    index = {}
    for i, names in enumerate(
        (list(stored)[:4], list(stored)[4:20], list(stored)[20:])
    ):
        torch.save({name: stored[name] for name in names}, tmp_path / f"{i}.bin")
        index |= dict.fromkeys(names, f"{i}.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": index}), "utf-8")
    return tmp_path


def sizes(folder):
    return [
        [w.numel() for w in torch.load(path, weights_only=True).values()]
        for path in shard_paths(folder)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_loading_has_the_peak_of_the_formula(folder, dtype):
    config = json.loads((folder / "config.json").read_text("utf-8"))

    def by_shards(_):
        with torch.device("meta"), WithoutInit():
            model = Llama(LlamaConfig.from_hf(config))
        tensors = rename(read_tensors(folder), names_by_layer(model, HF_NAMES))
        assign_strictly(model, tensors, dtype, copy=False)
        return model

    data = memory_data("ours", by_shards)
    whole = memory_data("load_model", lambda _: load_model(folder, dtype))
    numbers, width = sizes(folder), dtype.itemsize
    total, largest = sum(map(sum, numbers)), max(map(sum, numbers))
    assert data.final == width * total
    assert data.peak == peak_by_formula(numbers, 4, width)
    assert data.final <= data.peak <= data.final + 4 * largest
    assert whole.peak <= data.final + 4 * largest
    assert (data.final == data.peak) == (dtype == torch.float32)
    assert not data.built.any()
    assert data.total.min() == 0


def obvious(ledger, folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    ledger.phase = "build"
    model = Llama(LlamaConfig.from_hf(config))
    ledger.phase = "read"
    stored = dict(rename(read_tensors(folder), names_by_layer(model, HF_NAMES)))
    model.load_state_dict(stored)
    del stored
    ledger.phase = "cast"
    return model.half()


def test_the_obvious_way_takes_four_copies(folder):
    data = memory_data("obvious", lambda ledger: obvious(ledger, folder))
    total = sum(map(sum, sizes(folder)))
    assert (data.final, data.peak) == (2 * total, 8 * total)
    assert data.built.max() == data.read.max() == 4 * total
    assert data.phases[0] == "build"
    assert data.phases[-1] == "cast"
    assert data.total[-1] == data.final


def test_formula_by_hand():
    assert peak_by_formula([[6], [6]], 4, 2) == 48
    assert peak_by_formula([[6, 6]], 4, 2) == 60
    assert peak_by_formula([[1, 1, 1], [5]], 2, 2) == 16  # one copy
    assert peak_by_formula([[9, 1], [1]], 4, 2) == 2 * 9 + 4 * 10


def test_the_figure_says_the_peaks(folder):
    ways = [
        memory_data("obvious", lambda ledger: obvious(ledger, folder)),
        memory_data("by shards", lambda _: load_model(folder, torch.float16)),
    ]
    axes = draw_memory(ways).axes
    said = [{text.get_text() for text in ax.texts} for ax in axes]
    assert "peak 4.00" in said[0]
    assert f"peak {ways[1].peak / ways[1].final:.2f}" in said[1]
    assert [ax.get_title(loc="left") for ax in axes] == ["obvious", "by shards"]
    ticks = [tick.get_text() for tick in axes[0].get_xticklabels()]
    assert ticks == ["build", "read", "cast"]


def test_words_stand_where_their_colour_is():
    up = torch.arange(101)
    kept, none = up * 10, up * 0
    data = MemoryData("x", ("a",) * 101, kept, none, 2000 - none)
    (ax,) = draw_memory([data]).axes
    places = {text.get_text(): text.get_position() for text in ax.texts}
    x, y = places["the model"]
    blue = kept[int(x)] / data.final
    assert 0 < y < blue
    x, y = places["read from\nthe files"]
    blue = kept[int(x)] / data.final
    assert blue < y < blue + 2
    assert abs(y - 1) > 0.1  # off the dashed line
