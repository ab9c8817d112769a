"""The numbers behind the picture of what moves for one token."""

import pytest
import torch

from annotated_src.figures.cache import SMOLLM2
from annotated_src.figures.on_device import (
    StepBytes,
    budget_data,
    cache_bytes,
    draw_budgets,
    matrix_rows,
    step_bytes,
)
from annotated_src.models.llama import Llama, LlamaConfig


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(31, 2, 12, 6, 2, 4, 20, 64, 1e-5, 10_000.0, tied)


def matrices(model: Llama) -> dict[str, torch.Tensor]:
    """Those that multiply: all, and the embedding only as a head."""
    found = {name: w for name, w in model.named_parameters() if w.ndim == 2}
    if not model.config.tied_head:
        del found["embedding.weight"]
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step_are_the_model_s(tied):
    model = Llama(config(tied))
    weights = matrices(model).values()
    caches = sum(layer.num_bytes for layer in model.new_cache(1, 24))
    found = step_bytes(config(tied), 24)
    assert found == (sum(w.nbytes for w in weights), caches, 6 * caches)
    assert found.total == found.weights + 7 * caches
    assert matrix_rows(config(tied)) == sum(len(w) for w in weights)
    small = step_bytes(config(tied), 24, width=1, copies=0)
    scales = 4 * sum(len(w) for w in weights)
    assert small == (sum(w.numel() for w in weights) + scales, caches, 0)


def test_cache_bytes_grow_with_the_places():
    assert cache_bytes(config(), 10) == 10 * cache_bytes(config(), 1)
    assert cache_bytes(SMOLLM2, 256) == 11_796_480


@pytest.mark.parametrize("width", [0, 2, 8])
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"1 byte or 4 here, got {width}"):
        step_bytes(config(), 8, width)


def test_every_saving_saves():
    for cache_len in (256, 2048):
        rows = list(budget_data(SMOLLM2, cache_len).rows.values())
        totals = [row.total for row in rows]
        assert totals == sorted(totals, reverse=True)
        assert rows[1] == step_bytes(SMOLLM2, cache_len)
        # Query heads share keys three by three.
        assert rows[0].attended == 3 * rows[1].attended
        assert rows[-1].copied == 0


def test_at_2048_places_the_copies_are_the_most():
    rows = budget_data(SMOLLM2, 2048).rows
    found = rows["GQA, int8"]
    assert found == StepBytes(135_298_560, 94_371_840, 566_231_040)
    assert found.copied == max(found)
    assert max(budget_data(SMOLLM2, 256).rows["GQA, int8"]) == found.weights


def test_the_figure_says_the_totals():
    figure = draw_budgets([budget_data(SMOLLM2, n) for n in (256, 2048)])
    said = [{t.get_text().strip() for t in ax.texts} for ax in figure.axes]
    assert {"839 MB", "620 MB", "218 MB", "147 MB", "no saving"} <= said[0]
    assert {"2,573 MB", "1,199 MB", "796 MB", "230 MB"} <= said[1]
    widths = [patch.get_width() for patch in figure.axes[1].patches]
    assert abs(sum(widths) * 1e6 - sum(
        row.total for row in budget_data(SMOLLM2, 2048).rows.values()
    )) < 1  # fmt: skip
