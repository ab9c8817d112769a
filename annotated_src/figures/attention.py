"""Figures of the chapter on attention: two heads at work, the scale, the reach."""

import math
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor
from torch.nn import functional as F

from annotated_src.attention import attend
from annotated_src.figures.style import (
    BLUE,
    GREEN,
    GREY_INK,
    INK,
    ORANGE,
    BookFigure,
    panels,
)
from annotated_src.masks import causal_mask
from annotated_src.models.llama import LlamaBlock, LlamaConfig
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables

RHYME = (
    "<s> This is the house that Jack built "
    "This is the malt that lay in the house that Jack built"
)


class RhymeData(NamedTuple):
    """What two heads, one above the other, look at while they read."""

    words: list[str]  # T of them
    ids: Tensor  # (T,) the number of each word
    before: Tensor  # (T, T) weights of the first head
    found: Tensor  # (T, T) weights of the second head
    guesses: Tensor  # (T, V) the second head's output: weights of the next word


class ScaleData(NamedTuple):
    """Softmax of scores of random queries and keys, for wider and wider heads."""

    widths: list[int]
    num_keys: int
    looked_at: dict[str, list[float]]  # mean of exp(entropy), in tokens
    largest: dict[str, list[float]]  # mean of the largest weight
    slope: dict[str, list[float]]  # median of w (1 - w) of the largest weight


class FlowData(NamedTuple):
    """Size of the derivative of each output token by each input token."""

    titles: list[str]
    sizes: list[Tensor]  # each (T, T): outputs by inputs


def rhyme_data(text: str = RHYME) -> RhymeData:
    """Read a text with two heads whose queries and keys are set by hand."""
    words = text.split()
    vocabulary = list(dict.fromkeys(words))
    ids = torch.tensor([vocabulary.index(word) for word in words])
    word, place = F.one_hot(ids).double(), torch.eye(len(words), dtype=torch.float64)
    mask = causal_mask(len(words))

    def look(wanted: Tensor, offered: Tensor, values: Tensor) -> Tensor:
        width = max(x.shape[-1] for x in (wanted, offered, values))
        # One width for all three, as attend asks; the root undoes its division.
        triple = (wanted * math.sqrt(width), offered, values)
        q, k, v = (F.pad(x, (0, width - x.shape[-1]))[None, None] for x in triple)
        return attend(q, k, v, mask)[0, 0, :, : values.shape[-1]]

    # Head 1: "I stand at t; who stands at t - 1?" It copies the word it finds there.
    one_back = 30 * torch.cat((place[:1], place[:-1]))
    previous = look(one_back, place, word)
    # Head 2: "who follows a word like me?" If nobody does, the start token, at 15.
    start = word[:, :1]
    wanted = torch.cat((30 * word, torch.full_like(start, 15)), dim=1)
    offered = torch.cat((previous, start), dim=1)
    # With the identity as values, attention returns its weights.
    return RhymeData(
        words,
        ids,
        look(one_back, place, place),
        look(wanted, offered, place),
        look(wanted, offered, word),
    )


def scale_data(num_keys: int = 32, num_queries: int = 1000) -> ScaleData:
    """Draw queries and keys from a normal distribution, heads 1 to 1024 wide."""
    generator = torch.Generator().manual_seed(0)
    data = ScaleData([4**i for i in range(6)], num_keys, {}, {}, {})
    for name in ("divided", "bare"):
        for measured in data[2:]:
            measured[name] = []
    for width in data.widths:
        queries = torch.randn(num_queries, 1, width, generator=generator).double()
        keys = torch.randn(num_queries, num_keys, width, generator=generator).double()
        scores = (queries @ keys.mT)[:, 0]
        for name, divisor in (("divided", math.sqrt(width)), ("bare", 1.0)):
            weights = (scores / divisor).softmax(dim=-1)
            entropy = torch.special.entr(weights).sum(dim=-1)
            largest = weights.amax(dim=-1)
            slope = (largest * (1 - largest)).median()
            data.looked_at[name].append(entropy.exp().mean().item())
            data.largest[name].append(largest.mean().item())
            data.slope[name].append(slope.item())
    return data


def flow_data(num_tokens: int = 12, window: int = 3) -> FlowData:
    """Differentiate stacks of Llama blocks: every output token by every input token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=24,
        max_seq_len=num_tokens,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied_head=True,
    )
    blocks = [LlamaBlock(config).double() for _ in range(config.num_layers)]
    for block in blocks:
        block.requires_grad_(False)
    x = torch.randn(1, num_tokens, config.embed_dim, dtype=torch.float64)
    frequencies = rope_frequencies(config.head_dim, config.rope_base).double()
    cos, sin = rope_tables(torch.arange(num_tokens)[None], frequencies, x.dtype)
    rotate = partial(apply_rotary, cos=cos, sin=sin)
    causal = causal_mask(num_tokens)
    narrow = causal.triu(1 - window)
    titles, sizes = [], []
    for mask, name in ((causal, "causal"), (narrow, f"last {window} tokens")):
        for depth in (1, 2):

            def stack(x: Tensor, mask: Tensor = mask, depth: int = depth) -> Tensor:
                for block in blocks[:depth]:
                    x = block(x, rotate, mask)
                return x

            # Row by row: the fused attention knows no batch of gradients.
            jacobian = cast(Tensor, torch.autograd.functional.jacobian(stack, x))
            # (1, T, D, 1, T, D): of each number that leaves, by each that enters
            sizes.append(torch.linalg.vector_norm(jacobian[0, :, :, 0], dim=(1, 3)))
            titles.append(f"{name}, {depth} layer{'s' if depth > 1 else ''}")
    return FlowData(titles, sizes)


def draw_rhyme(data: RhymeData) -> BookFigure:
    """Draw the words in a column, both heads as arcs, and the guesses beside them."""
    figure, (ax,) = panels(height=5.9)
    vocabulary = dict(zip(data.ids.tolist(), data.words, strict=True))
    for t, word in enumerate(data.words):
        ax.text(-2.3, t, word, va="center")
        if t:
            _arc(ax, t, t - 1, -2.6, -0.8, GREY_INK, 1.1)
        following = data.words[t + 1] if t + 1 < len(data.words) else None
        for s in data.found[t, 1:].gt(0.1).nonzero()[:, 0].add(1).tolist():
            colour = _verdict(data.words[s], following)
            width = 0.6 + 2.2 * data.found[t, s].item()
            _arc(ax, t, s, 0.3, 2.6 * (t - s) ** 0.5, colour, width)
        likely = data.guesses[t, 1:].gt(0.1).nonzero()[:, 0].add(1).tolist()
        for place, guess in enumerate(vocabulary[i] for i in likely):
            colour = _verdict(guess, following)
            words = f"{guess} {MARKS[colour]}"
            ax.text(11.5 + 4.3 * place, t, words, va="center", color=colour)
    for x, words, colour in (
        (-7.3, "layer 1:\nwho stands\nbefore me?", GREY_INK),
        (0.3, "layer 2: what followed\na word like me?", INK),
        (11.5, "guess for the next word:\n✓ came true  ✗ did not", INK),
    ):
        ax.text(x, -1.0, words, va="bottom", color=colour)
    ax.set(xlim=(-7.4, 20.6), ylim=(len(data.words) - 0.4, -3.9))
    ax.axis("off")
    return figure


def draw_scale(data: ScaleData) -> BookFigure:
    """Draw how many tokens a query looks at, and how well the softmax still learns."""
    figure, (left, right) = panels(1, 2, height=3.6)
    colours = {"divided": BLUE, "bare": ORANGE}
    for name, colour in colours.items():
        left.semilogx(data.widths, data.looked_at[name], "o-", color=colour, ms=5)
        right.loglog(data.widths, data.slope[name], "o-", color=colour, ms=5)
    left.set_title(f"Tokens looked at, of {data.num_keys}")
    left.set_ylim(0, data.num_keys)
    right.set_title("Slope of the largest, $w(1-w)$")
    left.text(30, 23, r"divided by $\sqrt{d}$", color=BLUE)
    left.text(30, 4.6, "not divided", color=ORANGE)
    right.text(60, 0.25, r"divided by $\sqrt{d}$", color=BLUE)
    right.text(20, 8e-4, "not divided", color=ORANGE)
    right.set_ylim(2e-5, 1)
    for ax in (left, right):
        ax.set_xlabel("width of the head, $d$")
        ax.set_xticks(data.widths, [str(width) for width in data.widths])
        ax.minorticks_off()
    return figure


def draw_flow(data: FlowData) -> BookFigure:
    """Draw the four tables of derivatives; what is exactly zero stays white."""
    figure, axes = panels(2, 2, height=6.6, sharex=True, sharey=True)
    shade = Normalize(vmin=-2, vmax=1)
    for ax, size, title in zip(axes, data.sizes, data.titles, strict=True):
        table = torch.where(size > 0, size.log10(), torch.nan)
        ax.imshow(table.numpy(), norm=shade, cmap="viridis_r")
        ax.set_title(title)
        ax.text(len(size) - 1, 1, "exactly 0", ha="right", va="center")
        ax.set_xticks([0, 5, 10])
        ax.set_yticks([0, 5, 10])
    for ax in axes[2:]:
        ax.set_xlabel("input token")
    for ax in axes[::2]:
        ax.set_ylabel("output token")
    scale = ScalarMappable(shade, cmap="viridis_r")
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, ticks=[-2, -1, 0, 1])
    bar.set_label("size of the derivative")
    bar.ax.set_yticklabels(["0.01", "0.1", "1", "10"])
    return figure


def _arc(
    ax: Axes,
    start: int,
    end: int,
    base: float,
    reach: float,
    colour: str,
    width: float,
) -> None:
    """Draw an arrow from row to row that swings out sideways from a base."""
    turn = np.linspace(0, math.pi, 60)
    rows = (start + end) / 2 + (start - end) / 2 * np.cos(turn)
    dashes = "--" if colour == ORANGE else "-"
    ax.plot(base + reach * np.sin(turn), rows, dashes, color=colour, lw=width)
    tip = math.copysign(0.3, reach)
    ax.plot(
        [base + tip, base, base + tip],
        [end - 0.2, end, end + 0.2],
        color=colour,
        lw=min(width, 1.6),
    )


MARKS = {GREEN: "✓", ORANGE: "✗", BLUE: "(comes next)"}


def _verdict(guess: str, following: str | None) -> str:
    if following is None:
        return BLUE
    return GREEN if guess == following else ORANGE
