"""Pictures of ChatGLM as a whole: where its bytes are, and what it puts in a blank."""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.chatglm_quantize import quantize_linears
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.figures.style import AMBER, BLUE, GREY, INK, SKY, BookFigure, panels
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, blank_positions, mask_positions

SIX_B = ChatGLMConfig(
    vocab_size=130_528,
    num_layers=28,
    embed_dim=4096,
    num_heads=32,
    ffn_dim=16_384,
    max_seq_len=2048,
    norm_eps=1e-5,
    blank_ids=BlankIds(sop=130_004, gmask=130_001, mask=130_000),
)
"""ChatGLM-6B, as its config.json has it."""

PARTS = ("embedding", "attention", "feed-forward", "norms")


def part_of(name: str) -> str:
    """Say which of PARTS a tensor of our ChatGLM belongs to."""
    if name.startswith(("embedding", "lm_head")):
        return PARTS[0]
    if "norm" in name:
        return PARTS[3]
    return PARTS[1] if ".attention." in name else PARTS[2]


class BytesData(NamedTuple):
    """Memory that each part takes, for each width of the weights in the blocks."""

    bits: tuple[int, ...]
    bytes: Tensor  # (widths, parts)

    @property
    def totals(self) -> list[int]:
        """Bytes of the whole model, a width each."""
        return [int(total) for total in self.bytes.sum(-1)]


def bytes_data(config: ChatGLMConfig = SIX_B) -> BytesData:
    """Build the model without memory, in float16, int8 and int4, and add up."""
    bits = (16, 8, 4)
    counted = torch.zeros(len(bits), len(PARTS), dtype=torch.int64)
    for row, width in zip(counted, bits, strict=True):
        with torch.device("meta"):
            model = ChatGLM(config).half()
            model = model if width == 16 else quantize_linears(model, width)
        for name, tensor in model.state_dict().items():
            row[PARTS.index(part_of(name))] += tensor.nbytes
    return BytesData(bits, counted)


def draw_bytes(data: BytesData) -> BookFigure:
    """Draw a square for each width, its area the bytes, cut into parts."""
    figure, (ax,) = panels(height=3.15)
    left, colours = 0.0, dict(zip(PARTS, (BLUE, AMBER, SKY, GREY), strict=True))
    for width, row in zip(data.bits, data.bytes.tolist(), strict=True):
        side, bottom = math.sqrt(sum(row) / 1e9), 0.0
        for part, size in zip(PARTS, row, strict=True):
            height = size / 1e9 / side
            box = Rectangle((left, bottom), side, height, facecolor=colours[part])
            box.set(edgecolor="white", linewidth=1)
            ax.add_patch(box)
            if part != "norms":
                ink = "white" if part == "embedding" else INK
                words = f"{size / 1e9:.2f}"
                at = (left + side / 2, bottom + height / 2)
                ax.text(*at, words, ha="center", va="center_baseline", color=ink)
            if width == data.bits[0] and part != "norms":
                at = (left - 0.12, bottom + height / 2)
                ax.text(*at, part, ha="right", va="center")
            bottom += height
        name = "float16" if width == 16 else f"int{width}"
        words = f"{name}\n{sum(row) / 1e9:.2f} GB"
        ax.text(left + side / 2, side + 0.1, words, ha="center", va="bottom")
        left += side + 0.55
    ax.set(xlim=(-1.75, left - 0.4), ylim=(-0.05, 4.35), aspect="equal")
    ax.axis("off")
    return figure


class Answer(NamedTuple):
    """One way to fill a blank, and how likely the model thinks it."""

    ids: tuple[int, ...]  # without <eop>
    probability: float  # of these ids and <eop> after them


def likely_answers(
    model: ChatGLM, context: Sequence[int], eop_id: int, least: float
) -> list[Answer]:
    """Find every answer of probability least or more, the likeliest first.

    None is missed: an answer is never likelier than its beginning, so a beginning
    below least can be dropped. At most 1 / least beginnings of each length remain.
    """
    c, found = model.config, []
    where = torch.tensor([len(context)])
    blank = mask_positions(torch.tensor([context]), c.blank_ids.gmask, c.blank_ids.mask)
    todo: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # surprise, ids so far
    while todo:
        surprise, ids = heapq.heappop(todo)
        if ids and ids[-1] == eop_id:
            found.append(Answer(ids[:-1], math.exp(-surprise)))
            continue
        tokens = torch.tensor([[*context, c.blank_ids.sop, *ids]])
        if (length := tokens.shape[1]) > c.max_seq_len:
            continue
        with torch.no_grad():
            logits = model(tokens, positions=blank_positions(where, blank, length))
        steps = -logits[0, -1].log_softmax(-1)
        for token, step in enumerate(steps.tolist()):
            if surprise + step <= -math.log(least):
                heapq.heappush(todo, (surprise + step, (*ids, token)))
    return found


class FillsData(NamedTuple):
    """The likeliest answers for some blanks."""

    blanks: tuple[str, ...]  # sentences with [MASK]
    answers: tuple[tuple[tuple[str, float], ...], ...]  # text and probability


def fills_data(
    model: ChatGLM,
    tokenizer: ChatGLMTokenizer,
    blanks: Sequence[str],
    count: int = 5,
    least: float = 0.01,
) -> FillsData:
    """Fill each blank in the ways that the model finds likeliest, up to count."""
    rows = []
    for blank in blanks:
        context = context_of(tokenizer, blank)
        found = likely_answers(model, context, tokenizer.eos_id, least)[:count]
        rows.append(tuple((tokenizer.decode(a.ids), a.probability) for a in found))
    return FillsData(tuple(blanks), tuple(rows))


def context_of(tokenizer: ChatGLMTokenizer, blank: str) -> list[int]:
    """Turn a sentence with [MASK] into ids, as the training texts were.

    The tokenizer puts a space in front of what follows a special token. Where a comma
    follows, it is a piece of its own, and is taken out again.

    Raises:
        ValueError: not one [MASK].
    """
    if blank.count("[MASK]") != 1:
        raise ValueError(
            f"a blank has one [MASK], not {blank.count('[MASK]')}: {blank}"
        )
    before, after = map(tokenizer.encode_text, blank.split("[MASK]"))
    if after[:1] == [tokenizer.id_of("▁")]:
        after = after[1:]
    return [*before, tokenizer.mask_id, *after]


def draw_fills(data: FillsData) -> BookFigure:
    """Draw bars for the answers, a panel a blank, the sentence above it."""
    most = max(p for row in data.answers for _, p in row)
    height = 0.35 * sum(map(len, data.answers)) + 0.75 * len(data.blanks)
    ratios = [len(row) + 0.6 for row in data.answers]
    figure, axes = panels(
        len(data.blanks), 1, height=height, gridspec_kw={"height_ratios": ratios}
    )
    for ax, blank, row in zip(axes, data.blanks, data.answers, strict=True):
        _draw_answers(ax, row, most)
        ax.set_title(blank.replace("[MASK]", "____"), loc="left")
    return figure


def _draw_answers(ax: Axes, row: Sequence[tuple[str, float]], most: float) -> None:
    for y, (_, probability) in enumerate(row):
        colour = BLUE if y == 0 else SKY
        ax.barh(y, probability, color=colour, height=0.72)
        ax.text(probability + most / 60, y, f"{probability:.0%}", va="center")
    ax.set_yticks(range(len(row)), [text for text, _ in row])
    ax.set(xlim=(0, 1.15 * most), ylim=(len(row) - 0.5, -0.5), xticks=[])
    ax.tick_params(length=0)
    for side in ("bottom", "left"):
        ax.spines[side].set_visible(False)
