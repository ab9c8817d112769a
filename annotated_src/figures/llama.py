"""Pictures of the whole model: where its numbers sit, and how an answer forms."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from torch import Tensor

from annotated_src.figures.reading import token_label
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREY,
    INK,
    SIZE,
    SKY,
    WIDTH,
    BookFigure,
    ink_on,
    panels,
)
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.tokenizer import TextTokenizer

PARTS = ("embedding and head", "attention", "feed-forward", "norms")


class ParameterData(NamedTuple):
    """How many numbers each part of each model holds."""

    names: tuple[str, ...]
    counts: Int[Tensor, "models parts"]

    @property
    def shares(self) -> Float[Tensor, "models parts"]:
        """The part of each model that sits in each part, 0 to 1."""
        return self.counts / self.counts.sum(-1, keepdim=True)


def part_of(name: str) -> str:
    """Say which of PARTS a tensor of our Llama belongs to."""
    if name.startswith(("embedding", "lm_head")):
        return PARTS[0]
    if "norm" in name:
        return PARTS[3]
    return PARTS[1] if ".attention." in name else PARTS[2]


def parameter_data(configs: Mapping[str, LlamaConfig]) -> ParameterData:
    """Build each model without memory, and count its tensors part by part."""
    counts = torch.zeros(len(configs), len(PARTS), dtype=torch.int64)
    for row, config in zip(counts, configs.values(), strict=True):
        with torch.device("meta"):
            model = Llama(config)
        for name, weight in model.named_parameters():
            row[PARTS.index(part_of(name))] += weight.numel()
    return ParameterData(tuple(configs), counts)


def draw_parameters(data: ParameterData) -> BookFigure:
    """Draw one bar a model, all of the same length, cut where its numbers sit."""
    figure, (ax,) = panels(height=0.72 * len(data.names) + 0.9)
    totals = data.counts.sum(-1).tolist()
    for y, (row, total) in enumerate(zip(data.shares.tolist(), totals, strict=True)):
        _bar(ax, y, row)
        ax.text(1.012, y, _short(total), va="center", ha="left")
    middles = (data.shares[0].cumsum(0) - data.shares[0] / 2).tolist()
    names = ("embedding\n(and head)", PARTS[1], PARTS[2])
    for middle, name in zip(middles, names, strict=False):
        ax.text(middle, -0.38, name, ha="center", va="bottom")
    ax.set_yticks(range(len(data.names)), data.names)
    ax.set(xlim=(0, 1.13), ylim=(len(data.names) - 0.2, -0.95), xticks=[])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _bar(ax: Axes, y: int, shares: list[float]) -> None:
    left = 0.0
    for share, colour in zip(shares, (BLUE, AMBER, SKY), strict=False):  # norms: unseen
        ax.barh(y, share, left=left, height=0.6, color=colour, edgecolor="white")
        words = f"{share:.1%}"
        if share > 0.06:
            ink = "white" if colour == BLUE else INK
            ax.text(left + share / 2, y, words, color=ink, ha="center", va="center")
        else:  # too narrow to write in
            ax.text(0.0, y + 0.33, words, color=BLUE, ha="left", va="top")
        left += share


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


class LensData(NamedTuple):
    """What the final norm and the head read in the stream, after each block.

    Depth 0 is the embedding, depth L what the model really says.
    """

    inputs: tuple[str, ...]  # the tokens that come in, one a column
    answers: tuple[str, ...]  # the token that the last depth puts first
    best: tuple[tuple[str, ...], ...]  # the token that each depth puts first
    place: Int[Tensor, "depths columns"]  # of the answer among all V; 1 is first


def stream_by_depth(
    model: Llama, tokens: Int[Tensor, "1 T"]
) -> Float[Tensor, "depths T D"]:
    """Collect what enters each block, and at last what enters the final norm."""
    seen: list[Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _part, inputs: seen.append(inputs[0]))
        for part in (*model.blocks, model.norm)
    ]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(seen)


def lens_data(
    model: Llama, tokenizer: TextTokenizer, tokens: Int[Tensor, "1 T"], first: int
) -> LensData:
    """Read the stream of the tokens from number first on, at every depth."""
    stream = stream_by_depth(model, tokens)[:, first:]
    head = model.embedding if model.config.tied_head else model.lm_head
    with torch.no_grad():
        logits = model.norm(stream) @ head.weight.T
    best = logits.argmax(-1)
    answers = best[-1]
    chosen = logits.gather(-1, answers.expand(len(best), -1)[..., None])
    return LensData(
        tuple(token_label(tokenizer, int(i)) for i in tokens[0, first:]),
        tuple(token_label(tokenizer, int(i)) for i in answers),
        tuple(tuple(token_label(tokenizer, int(i)) for i in row) for row in best),
        (logits > chosen).sum(-1) + 1,
    )


FIRST = "#004470"
OTHERS = LinearSegmentedColormap.from_list(
    "places", ["#2F86BF", "#5FA6D3", "#A3CBE5", "#D5E5F0", "#F1F4F6", "#FFFFFF"]
)
WORST = 4.7  # log10 of the vocabulary's size


def draw_lens(data: LensData) -> BookFigure:
    """Draw a table, deeper is lower: the word read there, shaded by the answer's place.

    White on dark: the answer itself is in first place.
    """
    depths, columns = data.place.shape
    figure, (ax,) = panels(height=0.215 * depths + 1.7)
    for depth in range(depths):
        for column in range(columns):
            _lens_cell(ax, data, depth, column)
    for column, (word, answer) in enumerate(
        zip(data.inputs, data.answers, strict=True)
    ):
        centre = {"x": column + 0.5, "ha": "center"}
        ax.text(y=-0.35, s=_fit(word, columns), va="bottom", **centre)
        words = _fit(answer, columns)
        ax.text(y=depths + 0.35, s=words, va="top", color=FIRST, **centre)
    ax.text(-0.08, -0.35, "comes in", ha="right", va="bottom")
    ax.text(-0.08, depths + 0.35, "is said", ha="right", va="top", color=FIRST)
    names = ["embedding", "block 1", *map(str, range(2, depths - 1))]
    names.append(f"block {depths - 1}")
    ax.set_yticks([d + 0.5 for d in range(depths)], names)
    ax.set(xlim=(0, columns), ylim=(depths + 4, -1.6), xticks=[])
    ax.tick_params(length=0, pad=3)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _place_key(ax, columns / 8, depths + 2.6)
    return figure


def _fit(word: str, columns: int) -> str:
    """Cut the end off a word that is wider than a column of the table."""
    room, shown = 72 * 0.83 * WIDTH / columns, word
    while TextPath((0, 0), shown, size=SIZE).get_extents().width > room:
        word = word[:-1]
        shown = word + "…"
    return shown


def _shade(place: int) -> str | tuple[float, float, float, float]:
    if place == 1:
        return FIRST
    return OTHERS(torch.tensor(float(place)).log10().item() / WORST)


def _lens_cell(ax: Axes, data: LensData, depth: int, column: int) -> None:
    shade = _shade(int(data.place[depth, column]))
    box = Rectangle((column + 0.02, depth + 0.03), 0.96, 0.94, facecolor=shade)
    ax.add_patch(box)
    at = (column + 0.5, depth + 0.54)
    words = _fit(data.best[depth][column], len(data.inputs))
    ax.text(*at, words, ha="center", va="center", color=ink_on(shade))


def _place_key(ax: Axes, unit: float, top: float) -> None:
    """Explain the shades, below the table."""
    ax.text(2.2 * unit, top + 0.5, "place of what is said:", va="center", ha="right")
    steps = {1: "1st", 10: "10th", 100: "100th", 1000: "1000th", 10_000: "10 000th"}
    for i, (place, words) in enumerate(steps.items()):
        left, shade = (2.3 + i * 1.15) * unit, _shade(place)
        box = Rectangle((left, top), 1.1 * unit, 1.0, facecolor=shade)
        ax.add_patch(box)
        at = (left + 0.55 * unit, top + 0.54)
        ax.text(*at, words, ha="center", va="center", color=ink_on(shade))


class VotesData(NamedTuple):
    """What each part of the model adds to one word's score, above the average word."""

    word: str
    embedding: float
    attention: Float[Tensor, "L"]
    ffn: Float[Tensor, "L"]

    @property
    def total(self) -> float:
        """The word's logit, less the mean logit of the vocabulary."""
        return self.embedding + float(self.attention.sum() + self.ffn.sum())


def votes_data(
    model: Llama, tokenizer: TextTokenizer, tokens: Int[Tensor, "1 T"], word: int
) -> VotesData:
    """Split the score of a word, as the successor of tokens, over what was added."""
    added: list[Tensor] = []
    parts = [part for block in model.blocks for part in (block.attention, block.ffn)]  # type: ignore[union-attr]
    hooks = [
        part.register_forward_hook(lambda _part, _in, out: added.append(out[0, -1]))  # type: ignore[operator]
        for part in (model.embedding, *parts)
    ]
    try:
        end = stream_by_depth(model, tokens)[-1, -1]
    finally:
        for hook in hooks:
            hook.remove()
    head = model.embedding if model.config.tied_head else model.lm_head
    with torch.no_grad():
        rows = head.weight[word] - head.weight.mean(0)
        scale = (end.square().mean() + model.config.norm_eps).rsqrt()
        votes = torch.stack(added) @ (rows * model.norm.weight * scale)
    label = token_label(tokenizer, word)
    return VotesData(label, float(votes[0]), votes[1::2], votes[2::2])


def draw_votes(data: VotesData) -> BookFigure:
    """Draw a pair of bars a block: attention's vote and the feed-forward network's."""
    figure, (ax,) = panels(height=3.0)
    attention, ffn = data.attention, data.ffn
    blocks = range(1, len(ffn) + 1)
    ax.bar([i - 0.21 for i in blocks], attention.tolist(), width=0.42, color=AMBER)
    ax.bar([i + 0.21 for i in blocks], ffn.tolist(), width=0.42, color=BLUE)
    top = int(attention.argmax())
    words = f"attention, block {top + 1}"
    ax.text(top + 0.3, float(attention[top]), words, ha="right", va="top")
    top = int(ffn.argmax())
    at = (top + 1.5, float(ffn[top]) + 0.1)
    words = f"feed-forward,\nblock {top + 1}"  # two lines, to clear the bars before it
    ax.text(*at, words, ha="right", va="bottom", color=BLUE)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="block", ylabel="added to the score", xlim=(0.2, len(blocks) + 0.8))
    ax.set_title(f"Who votes for {data.word.strip('·')}")
    ax.margins(y=0.12)
    return figure
