"""Figure of the errata: what it costs to believe them, and which input would tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from annotated_src.activations import gelu_exact, gelu_tanh
from annotated_src.attention_by_layer import attend_by_layer, scores_by_layer
from annotated_src.feed_forward import FeedForward
from annotated_src.figures.style import BLUE, GREY, ORANGE, BookFigure, ink_on, panels
from annotated_src.golden import golden, golden_model
from annotated_src.masks import hide_padding, prefix_mask
from annotated_src.models.chatglm import ALPHA, ChatGLM
from annotated_src.positions import (
    BlankIds,
    blank_positions,
    context_lengths,
    mask_positions,
    prompt_positions,
)
from annotated_src.rotary import rope_frequencies, rope_tables, rotate_half
from annotated_src.rotary_2d import apply_rotary_2d, half_frequencies, rotation

TOLERANCE = 1e-4  # to which a float32 port agrees with the original's logits
PAD = 3
CASES = {  # each column of the figure, and the golden name of its logits
    "[gMASK]": "gmask_train",
    "[MASK]": "mask_train",
    "both masks": "both_tokens",
    "mixed batch": "batch_mixed",
    "pads, from ids": "batch_leftpad_model",
    "pads, given mask": "batch_leftpad_tokenizer",
    "far positions": "far_positions",
}


class Case(NamedTuple):
    """An input, and the original's logits for it."""

    tokens: Tensor
    positions: Tensor | None  # given, or to be read off the ids
    mask: Tensor | None
    logits: Tensor


def see(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    """Make the mask from the ids, if none is given."""
    if given is not None:
        return given
    return prefix_mask(context_lengths(tokens, ids.sop), tokens.shape[1])


def stand(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    """Read the positions off the ids, if none are given."""
    return prompt_positions(tokens, ids, rows=2) if given is None else given


@dataclass(frozen=True)
class Belief:
    """What a reader takes ChatGLM-6B to do; by default, what it does."""

    positions: Callable[..., Tensor] = stand
    mask: Callable[..., Tensor] = see
    rotate: Callable[..., Callable[[Tensor], Tensor]] = rotation
    attend: Callable[..., Tensor] = attend_by_layer
    feed_forward: Callable[[FeedForward, Tensor], Tensor] = FeedForward.forward
    alpha: float = ALPHA


def logits_if(belief: Belief, case: Case, model: Any) -> Tensor:
    """Run `ChatGLM.forward`, spelled out, with a belief in the place of each part."""
    ids = model.config.blank_ids
    mask = belief.mask(case.tokens, ids, case.mask)
    positions = belief.positions(case.tokens, ids, case.positions)
    x = model.embedding(case.tokens)
    rotate = belief.rotate(positions, model.config.head_dim, x.dtype)
    for block in model.blocks:
        x, attention = block.attention_norm(x), block.attention
        q, k, v = attention.split_heads(attention.qkv_proj(x))
        heads = belief.attend(rotate(q), rotate(k), v, mask, attention.layer)
        branch = attention.out_proj(heads.transpose(1, 2).flatten(2))
        x = block.ffn_norm(x * belief.alpha + branch)
        x = x * belief.alpha + belief.feed_forward(block.ffn, x)
    return F.linear(model.norm(x), model.lm_head.weight)


def _tables(frequencies: Tensor, angles_in: torch.dtype) -> Callable[..., Any]:
    """Rotate by other frequencies, or by angles formed in another dtype."""

    def rotate(positions: Tensor, _: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        tables = []
        for row in positions.unbind(1):
            angles = row[:, None, :, None].to(angles_in) * frequencies.to(angles_in)
            tables.append((angles.cos().to(dtype), angles.sin().to(dtype)))
        return partial(apply_rotary_2d, tables=tables)

    return rotate


def _paper_cosines(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Any:
    frequencies = half_frequencies(head_dim // 2).float()

    def turn(x: Tensor) -> Tensor:
        parts = []
        for part, row in zip(x.chunk(2, dim=-1), positions.unbind(1), strict=True):
            cos, sin = rope_tables(row, frequencies, dtype)
            cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
            parts.append(part * cos + rotate_half(part) * sin)
        return torch.cat(parts, dim=-1)

    return turn


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    layer: int,
    shrink: float = 1.0,
    restore: bool = True,
    hidden: float = -10000.0,
) -> Tensor:
    """Attend with another divisor, without the layer's number, or with another fill."""
    scores = scores_by_layer(q, k, layer) / shrink
    scores = scores * (layer if restore else 1)
    return scores.masked_fill(~mask, hidden).softmax(dim=-1) @ v


def _unpadded(tokens: Tensor, ids: BlankIds) -> Tensor:
    return context_lengths(tokens, ids.sop) - (tokens == PAD).sum(dim=-1)


def _see_unpadded(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    alone = prefix_mask(_unpadded(tokens, ids), tokens.shape[1])
    return alone if given is None else given


def _stand_unpadded(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    masks = mask_positions(tokens, ids.gmask, ids.mask)
    alone = blank_positions(_unpadded(tokens, ids), masks, tokens.shape[1])
    return alone if given is None else given


def _see_first(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    first = see(tokens[:1], ids, None).expand(len(tokens), -1, -1, -1)
    return first if given is None else given


def _stand_first(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    first = stand(tokens[:1], ids, None).expand(len(tokens), -1, -1)
    return first if given is None else given


def _prefer_mask(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    masks = mask_positions(tokens, ids.mask, ids.gmask)
    other = blank_positions(context_lengths(tokens, ids.sop), masks, tokens.shape[1])
    return other if given is None else given


def _count_on(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    if given is not None:
        return given
    place, step = stand(tokens, ids, None).unbind(1)
    has_gmask = (tokens == ids.gmask).any(dim=-1, keepdim=True)
    place = torch.where(has_gmask, torch.arange(tokens.shape[1]), place)
    return torch.stack((place, step), dim=1)


def _hide_pads(tokens: Tensor, ids: BlankIds, given: Tensor | None) -> Tensor:
    return hide_padding(see(tokens, ids, given), tokens != PAD)  # once more, if given


def _gated(ffn: FeedForward, x: Tensor) -> Tensor:
    wide = ffn.up_proj(x)
    return ffn.down_proj(gelu_tanh(wide) * wide)


def _erf(ffn: FeedForward, x: Tensor) -> Tensor:
    return ffn.down_proj(gelu_exact(ffn.up_proj(x)))


WIDTH = 8  # features in half a head of the golden model
BELIEFS = {  # by the number of the erratum
    "C2 α = √(2 × depth)": Belief(alpha=math.sqrt(2 * 3)),
    "C1 a gate in GLU": Belief(feed_forward=_gated),
    "B4 √ of the hidden size": Belief(attend=partial(_attend, shrink=2.0)),
    "B4 layer not undone": Belief(attend=partial(_attend, restore=False)),
    "L5 paper's cosines": Belief(rotate=_paper_cosines),
    "C1 GELU by erf": Belief(feed_forward=_erf),
    "C4 exact frequencies": Belief(
        rotate=_tables(rope_frequencies(WIDTH, 10000.0), torch.float32)
    ),
    "C4 angles in float16": Belief(
        rotate=_tables(half_frequencies(WIDTH), torch.float16)
    ),
    "C11 place counts on": Belief(positions=_count_on),
    "C5 MASK before gMASK": Belief(positions=_prefer_mask),
    "C11 row 0 for all rows": Belief(mask=_see_first, positions=_stand_first),
    "B5 pads do not count": Belief(mask=_see_unpadded, positions=_stand_unpadded),
    "C6 model hides pads": Belief(mask=_hide_pads),
    "C3 fill of −∞": Belief(attend=partial(_attend, hidden=-math.inf)),
    "C3 fill not × layer": Belief(attend=partial(_attend, hidden=-10000.0)),
}


@cache
def _model() -> ChatGLM:
    return golden_model()


def case(name: str) -> Case:
    """Read an input and its logits from the golden files."""
    ids, outputs = golden("ids"), golden("model_fp32")
    positions = mask = None
    source = name
    if name.startswith("batch_leftpad"):
        source = "batch_leftpad"
    if name == "batch_leftpad_tokenizer":
        positions = ids["batch_leftpad/tokenizer_position_ids"]
        mask = ~ids["batch_leftpad/tokenizer_attention_mask"]
    if name == "far_positions":
        source, positions = "gmask_train", outputs["far_positions/position_ids"]
    return Case(ids[f"{source}/input_ids"], positions, mask, outputs[f"{name}/logits"])


def gap(belief: Belief, name: str) -> float:
    """Measure the largest difference from the original's logits; NaN if one is."""
    given = case(name)
    return (logits_if(belief, given, _model()) - given.logits).abs().max().item()


class Costs(NamedTuple):
    """How far off the logits are, if a belief is put in the place of the truth."""

    beliefs: list[str]
    cases: list[str]
    gaps: Tensor  # (beliefs, cases); NaN where the logits are

    @property
    def told(self) -> Tensor:
        """Whether the logits tell: NaN does."""
        return ~(self.gaps <= TOLERANCE)


@cache
def costs_data() -> Costs:
    """Try every belief on every input."""
    rows = [[gap(b, name) for name in CASES.values()] for b in BELIEFS.values()]
    return Costs(list(BELIEFS), list(CASES), torch.tensor(rows))


def draw_costs(data: Costs) -> BookFigure:
    """Draw a cell for each belief and input: white where the logits do not tell."""
    figure, (ax,) = panels(height=6.9)
    for row, column in product(range(len(data.beliefs)), range(len(data.cases))):
        value = data.gaps[row, column].item()
        _cell(ax, column, row, value, bool(data.told[row, column]))
    ax.set(xlim=(0, len(data.cases)), ylim=(len(data.beliefs), 0))
    ax.set_xticks([c + 0.5 for c in range(len(data.cases))])
    ax.set_xticklabels(data.cases, rotation=50, ha="left", rotation_mode="anchor")
    ax.set_yticks([r + 0.5 for r in range(len(data.beliefs))])
    ax.set_yticklabels(data.beliefs)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _cell(ax: Axes, x: int, y: int, value: float, told: bool) -> None:
    colour, words = "white", "·"
    if math.isnan(value):
        colour, words = ORANGE, "NaN"
    elif told:
        depth = 0.2 + 0.8 * (math.log10(value) + 4) / 4.3  # 1e-4 to 2
        colour = tuple(1 - min(depth, 1) * (1 - part) for part in to_rgb(BLUE))
        words = f"{value:.0f}" if value > 1 else f"{value:.1g}"[1:]
    box = Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=GREY, lw=0.6)
    ax.add_patch(box)
    at = (x + 0.5, y + 0.5)
    ax.text(*at, words, ha="center", va="center", color=ink_on(colour))
