"""The grids of a figure that moves, against rounding written out, and arithmetic."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from annotated_src.figures.moving.int8_grid import int8_grid_data
from annotated_src.small_chatglm import SMALL_CHATGLM

CHAPTER = Path(__file__).resolve().parents[2] / "notebooks/device/03_quantizing.py"
NAME = "transformer.layers.0.mlp.dense_h_to_4h.weight"  # as the original calls it
SHARING = ("matrix", "row", "group")


@pytest.fixture(scope="module")
def data():
    return int8_grid_data()


@pytest.fixture(scope="module")
def weight():
    return load_file(SMALL_CHATGLM / "model.safetensors")[NAME].double()


@pytest.fixture(scope="module")
def others(weight):
    """The outlier's group, the rest of its row, and the other rows."""
    row, column = divmod(int(weight.abs().argmax()), 128)
    here = torch.arange(512)[:, None] == row
    near = torch.arange(128) // 32 == column // 32
    outlier = here & (torch.arange(128) == column)
    return here & near & ~outlier, here & ~near, (~here).expand(512, 128), outlier


def test_histogram_and_sizes(data, weight):
    assert data["shape"] == list(weight.shape) == [512, 128]
    assert sum(data["histogram"]) == weight.numel()
    assert data["outlier"] == pytest.approx(weight.abs().max().item(), abs=1e-4)
    assert data["rms"] == pytest.approx(weight.square().mean().sqrt().item(), abs=1e-4)
    middle = len(data["histogram"]) // 2
    width = 2 * weight.abs().max() / len(data["histogram"])
    inside = (weight.abs() < width / 2).sum().item()
    assert data["histogram"][middle] == pytest.approx(inside, abs=2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sharing", SHARING)
def test_each_grid_is_rounding_to_multiples_of_the_step(
    data, weight, others, bits, sharing
):
    *parts, outlier = others
    size = {"matrix": weight.numel(), "row": 128, "group": 32}[sharing]
    for times, found in zip(
        data["times"], data["grids"][str(bits)][sharing], strict=True
    ):
        grown = torch.where(outlier, times * weight, weight)
        groups = grown.view(-1, size)
        step = groups.abs().amax(1, keepdim=True) / (2**bits - 1) * 2
        rounded = ((groups / step).round() * step).view_as(weight)
        steps = step.expand_as(groups).reshape(weight.shape)
        for part, (scale, zeros, error) in zip(
            (*parts, ~outlier), (*found["places"], found["all"]), strict=True
        ):
            noise = (rounded - weight)[part].square().mean()
            share = (noise / weight[part].square().mean()).sqrt().item()
            assert scale == pytest.approx(steps[part].median().item(), rel=1e-3)
            gone = (rounded[part] == 0).double().mean().item()
            assert zeros == pytest.approx(gone, abs=5e-4)
            assert error == pytest.approx(share, rel=0.02)


def test_a_scale_locks_the_outlier_in(data):
    for grids in data["grids"].values():
        for sharing, spared in (("matrix", 0), ("row", 1), ("group", 2)):
            steps = [
                [grid["places"][place][0] for grid in grids[sharing]]
                for place in range(3)
            ]
            for place in range(3):
                grows = place < 3 - spared
                last = steps[place][-1] / steps[place][0]
                assert last == pytest.approx(
                    data["times"][-1] if grows else 1, rel=1e-3
                )


def test_what_the_chapter_says_is_what_one_sees(data):
    text = CHAPTER.read_text("utf-8").replace("\n# ", " ")
    said = re.search(r":class: moving int8-grid (.*?) :::", text)[1]
    four, eight = data["grids"]["4"], data["grids"]["8"]
    larger, largest = data["times"].index(8), data["times"].index(16)
    zeros = [round(100 * four["matrix"][i]["places"][2][1]) for i in (0, larger)]
    row = {round(100 * grid["places"][2][1]) for grid in four["row"]}
    error, before = (
        round(100 * grid["all"][2])
        for grid in (eight["matrix"][largest], four["matrix"][0])
    )
    rows, columns = data["shape"]
    for words in (
        f"{rows} rows of {columns} weights",
        f"it is {data['outlier']:.2f}.",
        f"{zeros[0]} % of the other rows become 0, and {zeros[1]} % when that weight",
        "is 8 times as large",
        f"each row they lose {row.pop()} %, however large it is",
        f"16 times: the error is {error} % of the weights. Four bits had {before} %",
    ):
        assert words in said
    assert not row  # one number, whatever the outlier
    safe = {grid["places"][1][1] for grid in four["group"]}
    assert len(safe) == 1
    assert safe.pop() < four["row"][0]["places"][1][1]
    assert error < before
