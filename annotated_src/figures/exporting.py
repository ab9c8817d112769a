"""Pictures of exporting: what calls do to the cache, and what entries are made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.edge_model import make_entries
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREY_INK,
    INK,
    ORANGE,
    PALE_ORANGE,
    BookFigure,
    panels,
)
from annotated_src.models.llama import Llama
from annotated_src.tflite_file import operators

JUNK, KEPT, UNUSED = PALE_ORANGE, "#EDEFF2", "white"

GROUPS = {
    "products with weights": ("FULLY_CONNECTED",),
    "attention": ("BATCH_MATMUL", "SOFTMAX", "SELECT_V2"),
    "writes to the cache": ("DYNAMIC_UPDATE_SLICE",),
    "arithmetic": ("ADD", "MUL", "MEAN", "RSQRT", "LOGISTIC"),
    "numbers put elsewhere": (
        "RESHAPE",
        "TRANSPOSE",
        "SLICE",
        "CONCATENATION",
        "PACK",
        "BROADCAST_TO",
    ),
    "look-ups, and their checks": (
        "EMBEDDING_LOOKUP",
        "GATHER_ND",
        "LESS",
        "LESS_EQUAL",
        "GREATER_EQUAL",
        "LOGICAL_AND",
        "REDUCE_ALL",
        "SELECT",
    ),
}
"""Operators of a file by what they are for.

SELECT_V2 puts -inf where the mask says; two of each entry guard look-ups.
"""


class CallsData(NamedTuple):
    """What each call wrote to the cache, and what the cache then held."""

    words: tuple[str, ...]
    written: Bool[Tensor, "calls S"]
    right: Bool[Tensor, "calls S"]  # the key of the token of this place, in all layers
    visible: Int[Tensor, "calls"]  # places that the call's last real token sees


def calls_data(
    model: Llama, words: Sequence[str], prompt_len: int, prefill: int, cache: int
) -> CallsData:
    """Run prefill with a padded prompt, then decode, and compare with the true cache.

    The words only label the tokens; the ids are their numbers, 1 2 3 …. The cache
    begins full of 99, and 0 fills the prompt up.
    """
    entries = make_entries(model, prefill, cache)
    (reader, sample), (writer, _) = entries["prefill"], entries["decode"]
    tokens = torch.arange(1, len(words) + 1, dtype=torch.int32)[None]
    truth = model.new_cache(1, cache)
    model(tokens, truth)
    kv = {name: torch.full_like(part, 99.0) for name, part in sample["kv"].items()}
    padded = torch.zeros(1, prefill, dtype=torch.int32)
    padded[:, :prompt_len] = tokens[:, :prompt_len]
    calls = [(reader, padded, torch.arange(prefill, dtype=torch.int32))]
    for i in range(prompt_len, len(words)):
        at = torch.tensor([i], dtype=torch.int32)
        calls.append((writer, tokens[:, i : i + 1], at))
    written, right = [], []
    for entry, ids, positions in calls:
        after = entry(tokens=ids, input_pos=positions, kv=kv)["kv"]
        written.append((after["k_0"] != kv["k_0"]).any(dim=(0, 1, 3)))
        right.append(_right_places(after, truth, len(words)))
        kv = after
    visible = torch.arange(prompt_len, len(words) + 1)
    return CallsData(tuple(words), torch.stack(written), torch.stack(right), visible)


def _right_places(kv: dict[str, Tensor], truth: list, num_tokens: int) -> Tensor:
    agree = [
        torch.isclose(kv[f"k_{i}"], layer.keys, atol=1e-4).all(dim=(0, 1, 3))
        for i, layer in enumerate(truth)
    ]
    places = torch.arange(len(agree[0]))
    return torch.stack(agree).all(dim=0) & (places < num_tokens)


def draw_calls(data: CallsData) -> BookFigure:
    """Draw the cache after each call: one row a call, one column a place."""
    figure, (ax,) = panels(height=4.8)
    calls, places = data.written.shape
    for row in range(calls):
        for place in range(places):
            right, fresh = bool(data.right[row, place]), bool(data.written[row, place])
            fill = (BLUE if fresh else KEPT) if right else JUNK if fresh else UNUSED
            stale = not right and not fresh and bool(data.written[:row, place].any())
            word = data.words[place] if right else "0" if fresh or stale else "99"
            dark = fresh or stale
            ink = "white" if right and fresh else INK if dark else GREY_INK
            _cell(ax, row, place, word, JUNK if stale else fill, ink)
        end = int(data.visible[row])
        ax.plot([end, end], [row + 0.02, row + 0.98], color=ORANGE, lw=3)
    ax.set(xlim=(-0.05, places + 0.05), ylim=(calls + 1.0, -0.1), xticks=[])
    names = ["prefill", *["decode"] * (calls - 1)]
    ax.set_yticks([row + 0.5 for row in range(calls)], names)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("The cache after each call", loc="left")
    _key(ax, calls)
    return figure


def _cell(ax: Axes, row: int, place: int, word: str, fill: str, ink: str) -> None:
    box = Rectangle(
        (place + 0.03, row + 0.08), 0.94, 0.84, facecolor=fill, edgecolor=KEPT
    )
    ax.add_patch(box)
    middle = (place + 0.5, row + 0.53)
    ax.text(*middle, word, color=ink, ha="center", va="center")


def _key(ax: Axes, row: int) -> None:
    for left, fill, words in (
        (0.0, BLUE, "token, written"),
        (2.55, KEPT, "token, kept"),
        (4.8, JUNK, "junk"),
    ):
        box = Rectangle((left, row + 0.4), 0.35, 0.42, facecolor=fill)
        ax.add_patch(box)
        ax.text(left + 0.47, row + 0.63, words, va="center")
    ax.plot([6.3, 6.3], [row + 0.38, row + 0.86], color=ORANGE, lw=3)
    ax.text(6.5, row + 0.63, "the mask ends here", va="center")


class OperatorsData(NamedTuple):
    """How many operators of each group the two entries have."""

    groups: tuple[str, ...]
    prefill: Int[Tensor, "groups"]
    decode: Int[Tensor, "groups"]


def operators_data(path: Path | str) -> OperatorsData:
    """Count a file's operators by group.

    Raises:
        ValueError: an operator is in no group.
    """
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    counts = {}
    for entry, steps in operators(path).items():
        if strange := sorted(set(steps) - set(group_of)):
            raise ValueError(f"operators of no group: {', '.join(strange)}")
        found = [group_of[step] for step in steps]
        counts[entry] = torch.tensor([found.count(group) for group in GROUPS])
    return OperatorsData(tuple(GROUPS), counts["prefill"], counts["decode"])


def draw_operators(data: OperatorsData) -> BookFigure:
    """Draw the counts as pairs of bars, decode above prefill."""
    figure, (ax,) = panels(height=4.8)
    for i in range(len(data.groups)):
        for entry, colour, shift in (("decode", BLUE, -0.2), ("prefill", AMBER, 0.2)):
            count = int(getattr(data, entry)[i])
            ax.barh(i + shift, count, height=0.38, color=colour)
            words = f"{count} in {entry}" if i == 0 else str(count)
            ax.text(count + 0.6, i + shift, words, va="center")
    ax.set_yticks(range(len(data.groups)), data.groups)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    totals = int(data.decode.sum()), int(data.prefill.sum())
    words = f"Operators in the file:\n{totals[0]} for one token, {totals[1]} for many"
    ax.set_title(words, loc="left")
    return figure
