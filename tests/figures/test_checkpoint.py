"""The numbers behind the pictures of a checkpoint."""

import json
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from safetensors.torch import save

from annotated_src.checkpoint import load_model
from annotated_src.figures.checkpoint import (
    draw_dump,
    draw_flips,
    draw_map,
    dump_data,
    flip_data,
    map_data,
)
from annotated_src.figures.style import BLUE
from annotated_src.models.llama import Llama, LlamaConfig

A = torch.tensor([[1.0, -2.5], [0.1, 3.0]])
CAPITAL = [[504, 3575, 282, 4649, 314]]  # The capital of France is


def words_of(figure):
    return {text.get_text() for ax in figure.axes for text in ax.texts}


def header_of(file):
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))


def small_model(tied=False):
    model = Llama(LlamaConfig(31, 2, 12, 6, 2, 4, 20, 64, 1e-5, 10_000.0, tied))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


def test_the_dump_covers_every_byte_once():
    raw = save({"a": A, "b": A.flatten()[:3].bfloat16()})
    data = dump_data(raw)
    assert data.content == raw
    assert [part[0] for part in data.parts] == ["length", "header", "a", "b"]
    edges = [0, *(part.stop for part in data.parts)]
    assert [part.start for part in data.parts] == edges[:-1]
    assert edges == [0, 8, 128, 144, len(raw)]


def test_the_dump_decodes_the_numbers():
    data = dump_data(save({"b": A.bfloat16(), "a": A}))
    for name, tensor in (("a", A), ("b", A.bfloat16())):
        found = [(place, value) for place, value in data.numbers if place.name == name]
        assert [value for _, value in found] == tensor.flatten().tolist()
        width = tensor.dtype.itemsize
        assert all(place.stop - place.start == width for place, _ in found)
        assert all(p.stop == q.start for (p, _), (q, _) in pairwise(found))


def test_the_picture_of_the_dump_shows_every_byte():
    raw = save({"a": A, "b": A.flatten()[:3].bfloat16()})
    figure = draw_dump(dump_data(raw))
    shown = [text.get_text() for text in figure.axes[0].texts]
    for value in set(raw):
        assert shown.count(f"{value:02x}") >= raw.count(value)
    assert {"length: 8 bytes", "header: 120 bytes", "−2.5", "0.1001"} <= set(shown)


def test_the_map_is_in_the_order_of_the_bytes():
    tensors = {f"model.layers.{i}.x": torch.zeros(i + 1) for i in range(3)}
    raw = save({"model.embed_tokens.weight": torch.zeros(5), **tensors})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = map_data(dict(reversed(header.items())) | {"__metadata__": {"a": "b"}})
    assert data.names == ("model.embed_tokens.weight", *tensors)
    assert data.starts.tolist() == [0, 20, 24, 32]
    assert data.stops.tolist() == [20, 24, 32, 44]
    assert data.row_bytes == 4


def test_the_map_of_the_real_model(smollm2_dir):
    data = map_data(header_of(smollm2_dir / "model.safetensors"))
    assert len(data.names) == 272
    assert data.row_bytes == 14_160_384
    assert data.names[0] == "model.embed_tokens.weight"
    assert data.stops[0] == 49_152 * 576 * 4
    assert torch.equal(data.starts[1:], data.stops[:-1])
    # A row of the picture is a layer only because the embedding nearly fills eight.
    assert 0 <= 8 * data.row_bytes - int(data.stops[0]) < data.row_bytes / 300
    figure = draw_map(data)
    words = words_of(figure)
    assert "embedding: 21% of the file" in words
    bold = [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"]
    assert bold == ["layer 10", "layer 2", "layer 20", "layer 3"]  # the count jumps
    layers = [int(word[6:]) for word in words if word.startswith("layer ")]
    assert sorted(layers) == list(range(30))


def test_flips_change_one_bit_and_are_taken_back():
    model = small_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    name, index = "blocks.1.ffn.down_proj.weight", (2, 7)
    data = flip_data(model, tokens, name, index)
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())
    weight = before[name][index]
    assert data.weight == weight.item()
    patterns = data.flipped.float().view(torch.int32) ^ weight.view(torch.int32)
    assert [p % 2**32 for p in patterns.tolist()] == [1 << bit for bit in range(32)]
    assert data.flipped[31] == -data.weight
    assert data.is_set[31] == (data.weight < 0)
    smaller = data.flipped.abs() < abs(data.weight)
    assert torch.equal(smaller[:31], data.is_set[:31])  # without a 1, less


def test_flips_measure_the_change_of_the_logits():
    model = small_model(tied=True)
    tokens = torch.tensor([[3, 1, 4]])
    data = flip_data(model, tokens, "embedding.weight", (1, 5))
    with torch.no_grad():
        right = model(tokens)[0, -1]
        model.embedding.weight[1, 5] = data.flipped[22].float()
        moved = model(tokens)[0, -1]
    assert data.change[22] == pytest.approx((moved - right).abs().max().item())
    assert data.answers[22] == moved.argmax()
    first, second = right.sort(descending=True).values[:2].tolist()
    assert data.lead == pytest.approx(first - second)


def test_flips_of_the_chapter(smollm2_dir):
    model = load_model(smollm2_dir)
    data = flip_data(model, torch.tensor(CAPITAL), "embedding.weight", (3575, 11))
    assert data.weight == pytest.approx(-0.114429, abs=1e-6)
    paris = data.answers.mode().values
    assert (data.answers != paris).nonzero().flatten().tolist() == [25, 30]
    assert data.flipped[25] == pytest.approx(16 * data.weight)
    assert data.change[25] == pytest.approx(10.46, abs=0.05)
    assert data.change[30] == pytest.approx(8.0055e37, rel=1e-3)
    assert data.change[:12].max() < 2e-4  # the floor: last digits
    assert data.lead == pytest.approx(2.4827, abs=1e-3)
    figure = draw_flips(data, {25: "“1000.”", 30: "not “Paris”"})
    words = words_of(figure)
    bars = [to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches]
    assert [bit for bit, colour in enumerate(bars) if colour != BLUE] == [25, 30]
    assert {"“1000.”", "the lead of “Paris”: 2.5"} <= words
    assert any("not “Paris”" in word and "10^{37}" in word for word in words)
