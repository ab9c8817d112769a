"""Figures of the chapter on ChatGLM's block: three wirings, and what each one keeps."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SIZE,
    BookFigure,
    panels,
)
from annotated_src.masks import prefix_mask
from annotated_src.models.chatglm import ChatGLMBlock, ChatGLMConfig
from annotated_src.positions import BlankIds
from annotated_src.rotary_2d import rotation

Step = Callable[[Tensor], Tensor]
Sublayer = tuple[Step, Step]  # its norm, its branch
DIM, EPS = 64, 1e-5


class Wiring(NamedTuple):
    """The steps of one sublayer, in the order in which they are computed."""

    name: str
    steps: tuple[str, ...]


PRE_NORM = Wiring("Llama", ("fork", "norm", "branch", "add"))
CHATGLM = Wiring("ChatGLM-6B", ("norm", "fork", "branch", "add"))
POST_NORM = Wiring("post-norm", ("fork", "branch", "add", "norm"))


def follow(
    wiring: Wiring, x: Tensor, sublayers: Iterable[Sublayer], alpha: float
) -> list[Tensor]:
    """Compute what stands on the stream: x, then the result of each sublayer."""
    stream = [x]
    for norm, branch in sublayers:
        kept = x
        for step in wiring.steps:
            if step == "fork":
                kept = x
            elif step == "add":
                x = alpha * kept + x
            else:
                x = norm(x) if step == "norm" else branch(x)
        stream.append(x)
    return stream


def final_norm(x: Tensor) -> Tensor:
    """Norm without gain and bias, as a fresh model's last norm."""
    return F.layer_norm(x, (DIM,), eps=EPS)


def in_parts(sublayers: list[Sublayer], num_parts: int) -> list[Sublayer]:
    """Make sublayers that keep who added what apart, in a first dimension.

    Part 0 is the input, part k what branch k added. A norm shifts and scales all parts
    as it does their sum. For norms without gain and bias, as fresh ones are.
    """

    def norm_parts(parts: Tensor) -> Tensor:
        variance = parts.sum(0).var(dim=-1, correction=0, keepdim=True)
        return (parts - parts.mean(dim=-1, keepdim=True)) / (variance + EPS).sqrt()

    def branch_parts(parts: Tensor, branch: Step, k: int) -> Tensor:
        added = branch(parts.sum(0))
        slot = F.one_hot(torch.tensor(k), num_parts).to(added.dtype)
        return slot.view(-1, 1, 1, 1) * added

    return [
        (norm_parts, partial(branch_parts, branch=branch, k=k))
        for k, (_, branch) in enumerate(sublayers, 1)
    ]


def random_blocks(num_layers: int) -> list[ChatGLMBlock]:
    """Make blocks whose matrices keep the scale of their input: variance 1/fan-in."""
    config = ChatGLMConfig(
        vocab_size=128,
        num_layers=num_layers,
        embed_dim=DIM,
        num_heads=4,
        ffn_dim=4 * DIM,
        max_seq_len=32,
        norm_eps=EPS,
        blank_ids=BlankIds(sop=1, gmask=2, mask=3),
    )
    blocks = [ChatGLMBlock(config, layer) for layer in range(1, num_layers + 1)]
    for block in blocks:
        for name, weight in block.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            elif "proj" in name:
                nn.init.zeros_(weight)
    return blocks


def sublayers_of(blocks: list[ChatGLMBlock], num_tokens: int = 32) -> list[Sublayer]:
    """List attention and feed-forward network of each block, with their norms.

    The first half of the tokens is read in both directions.
    """
    row = torch.arange(num_tokens)
    rotate = rotation(torch.stack((row, row.flip(0)))[None], DIM // 4, torch.float32)
    mask = prefix_mask(torch.tensor([num_tokens // 2]), num_tokens)
    return [
        pair
        for block in blocks
        for pair in (
            (block.attention_norm, partial(block.attention, rotate=rotate, mask=mask)),
            (block.ffn_norm, block.ffn),
        )
    ]


class Case(NamedTuple):
    """One way to wire the same random blocks."""

    words: str
    wiring: Wiring
    power: float  # alpha is (2 * num_layers) to this power
    colour: str


CASES = (
    Case("pre-norm", PRE_NORM, 0.0, INK),
    Case("α = 1", CHATGLM, 0.0, ORANGE),
    Case("α = $(2N)^{1/4}$", CHATGLM, 0.25, GREEN),
    Case("α = $(2N)^{1/2}$", CHATGLM, 0.5, BLUE),
)


class Pass(NamedTuple):
    """What one forward and backward pass through a random stack shows."""

    stream: Tensor  # (L + 1,) RMS before each block, and behind the last
    there: Tensor  # (2L + 1,) share of the last vector there after each sublayer
    change: float  # of the last vector by one step of training, relative


def measure(case: Case, num_layers: int = 28, seed: int = 0) -> Pass:
    """Send random vectors up and a random loss down; then take one step.

    The step is Adam's first: each weight moves by 0.001 against its gradient.
    """
    torch.manual_seed(seed)
    blocks = random_blocks(num_layers)
    sublayers = sublayers_of(blocks)
    alpha = (2 * num_layers) ** case.power
    x = torch.randn(2, 32, DIM)  # (B, T, D)
    head, targets = torch.randn(128, DIM) / 8, torch.randint(128, (2 * 32,))
    stream = follow(case.wiring, x, sublayers, alpha)
    last = final_norm(stream[-1])
    loss = F.cross_entropy((last @ head.T).flatten(0, 1), targets)
    weights = [w for block in blocks for w in block.parameters() if w.dim() == 2]
    gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        there = _shares(case, x, sublayers, alpha)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 1e-3 * gradient.sign()
        moved = final_norm(follow(case.wiring, x, sublayers, alpha)[-1])
        change = (moved - last).norm() / last.norm()
        sizes = [at.square().mean().sqrt() for at in stream[::2]]
    return Pass(torch.stack(sizes), there, change.item())


def _shares(case: Case, x: Tensor, sublayers: list[Sublayer], alpha: float) -> Tensor:
    count = len(sublayers) + 1
    start = F.pad(x[None], (0, 0, 0, 0, 0, 0, 0, count - 1))  # all of it is part 0
    split = in_parts(sublayers, count)
    parts = split[0][0](follow(case.wiring, start, split, alpha)[-1])
    whole = parts.sum(0)
    along = (parts * whole).sum(dim=(1, 2, 3)) / whole.square().sum()
    return along.cumsum(0)


class DepthData(NamedTuple):
    """One row for each of CASES, a mean over seeds."""

    stream: Tensor  # (4, L + 1)
    there: Tensor  # (4, 2L + 1)
    depths: tuple[int, ...]
    changes: Tensor  # (4, len(depths))


def depth_data(
    num_layers: int = 28,
    depths: tuple[int, ...] = (2, 4, 8, 16, 28),
    num_seeds: int = 3,
) -> DepthData:
    """Measure every case, by layer in one stack, and in stacks of several depths."""
    rows: list[tuple[Tensor, ...]] = []
    for case in CASES:
        stacks = {
            depth: [measure(case, depth, seed) for seed in range(num_seeds)]
            for depth in {*depths, num_layers}
        }
        full = stacks[num_layers]
        changes = [sum(p.change for p in stacks[depth]) / num_seeds for depth in depths]
        rows.append(
            (
                torch.stack([each.stream for each in full]).mean(dim=0),
                torch.stack([each.there for each in full]).mean(dim=0),
                torch.tensor(changes),
            )
        )
    stream, there, changes = map(torch.stack, zip(*rows, strict=True))
    return DepthData(stream, there, depths, changes)


# ---------------------------------------------------------------- drawing

HEIGHTS = {"fork": 0.45, "norm": 1.0, "branch": 1.0, "add": 0.75}
ASIDE = 1.3  # how far to the right of the stream a branch stands


class Column(NamedTuple):
    """One column of the picture: a stream from top to bottom."""

    title: str
    below: str
    wiring: Wiring
    alpha: str
    first: str  # what comes before the sublayers
    last: str  # and after them
    frame: tuple[int, int]  # of a block: from which step to which, both counted from 0


COLUMNS = (
    Column("Llama", "pre-norm", PRE_NORM, "", "", "norm", (0, 7)),
    Column("ChatGLM-6B", "as in its file", CHATGLM, "× α", "", "norm", (0, 7)),
    Column("ChatGLM-6B", "cut later: post-norm", POST_NORM, "× α", "norm", "", (1, 8)),
)


class Part(NamedTuple):
    """Something drawn in a column: what, and between which heights."""

    step: str
    top: float
    bottom: float
    aside: bool  # on a branch, not on the stream


def column_parts(column: Column) -> list[Part]:
    """Lay two sublayers out from top to bottom, each step below the last."""
    steps = [column.first, *column.wiring.steps * 2, column.last]
    parts, top, aside = [], 0.0, False
    for step in filter(None, steps):
        bottom = top - HEIGHTS[step]
        aside = aside and step != "add"
        parts.append(Part(step, top, bottom, aside))
        aside, top = aside or step == "fork", bottom
    return parts


def draw_wiring() -> BookFigure:
    """Draw the three columns; the stream is the thick line, a norm on it breaks it."""
    figure, axes = panels(1, 3, height=6.6)
    for ax, column in zip(axes, COLUMNS, strict=True):
        parts = column_parts(column)
        end = parts[-1].bottom
        ax.plot([0, 0], [0.5, end - 0.45], color=ORANGE, lw=5, solid_capstyle="butt")
        names = iter(("attention", "FFN"))
        fork = 0.0
        for part in parts:
            middle = (part.top + part.bottom) / 2
            x = ASIDE if part.aside else 0.0
            if part.step == "fork":
                fork = middle
            elif part.step == "add":
                ax.plot([0, ASIDE, ASIDE, 0], [fork, fork, middle, middle], color=INK)
                _plus(ax, middle)
                if column.alpha:
                    ax.text(-0.16, (fork + middle) / 2, column.alpha, ha="right")
            elif part.step == "norm":
                _box(ax, x, middle, "norm", BLUE, "white")
            else:
                _box(ax, x, middle, next(names), "white", INK)
        low, high = column.frame
        _frame(ax, parts[low].top, parts[high].bottom)
        ax.text(0.6, 1.25, column.title, ha="center", weight="bold", size=SIZE + 1)
        ax.text(0.6, 0.8, column.below, ha="center")
        ax.set(xlim=(-1.1, 2.3), ylim=(end - 0.5, 1.65))
        ax.axis("off")
    return figure


def _box(ax: Axes, x: float, y: float, words: str, fill: str, ink: str) -> None:
    width, height = 1.7 if len(words) > 5 else 1.15, 0.54
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=style, fc=fill, ec=INK, lw=1.2, zorder=3
        )
    )
    ax.text(x, y, words, ha="center", va="center", color=ink, zorder=4)


def _plus(ax: Axes, y: float) -> None:
    ax.plot([0], [y], marker="o", ms=17, mfc="white", mec=INK, mew=1.2, zorder=3)
    ax.text(0, y, "+", ha="center", va="center_baseline", size=SIZE + 3, zorder=4)


def _frame(ax: Axes, top: float, bottom: float) -> None:
    ax.add_patch(
        Rectangle(
            (-0.95, bottom),
            3.2,
            top - bottom,
            fill=False,
            ec=GREY,
            lw=1.3,
            ls=(0, (4, 3)),
        )
    )


def draw_depth(data: DepthData) -> BookFigure:
    """Draw the stream's size, and how early the last vector was there."""
    figure, (left, right) = panels(1, 2, height=4.0)
    for case, stream, there in zip(CASES, data.stream, data.there, strict=True):
        left.plot(stream, color=case.colour)
        right.plot(there, color=case.colour)
    left.set_title("RMS of the stream")
    left.set(xlabel="blocks passed", ylim=(0, 9))
    _name(left, (14.5, 4.6, 29), (14, 0.5), (19, 2.15), (14, 7.85))
    right.set_title("Share of the last vector\nthat is there already")
    right.set(xlabel="sublayers passed", ylim=(-0.14, 1.04))
    _name(right, (19, 0.38, 42), (22, -0.09), (31, 0.065), (20, 0.91))
    return figure


def draw_steps(data: DepthData) -> BookFigure:
    """Draw what one step of training changes, against the depth of the stack."""
    figure, (ax,) = panels(height=4.2)
    for case, changes in zip(CASES, data.changes, strict=True):
        ax.plot(data.depths, changes, color=case.colour, marker="o", ms=6)
    ax.set(xlabel="blocks in the stack, N", ylabel="change by one step")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(data.depths, [str(depth) for depth in data.depths])
    ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["5%", "10%", "20%", "50%", "100%"])
    _name(ax, (5.6, 0.45, 31), (4.9, 0.83, 32), (6.1, 0.2, 38), (11, 0.105))
    ax.minorticks_off()
    return figure


def _name(ax: Axes, *places: tuple[float | int, ...]) -> None:
    """Write each case's words at (x, y), or at (x, y, degrees)."""
    for case, (x, y, *slope) in zip(CASES, places, strict=True):
        ax.text(x, y, case.words, color=case.colour, ha="center", rotation=sum(slope))
