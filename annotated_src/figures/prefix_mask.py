"""Figures of the chapter on prefix-LM masks: what may flow, and what one word costs."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from torch import Tensor

from annotated_src.figures.style import BLUE, GREY, INK, ORANGE, SKY, BookFigure, panels
from annotated_src.masks import causal_mask, prefix_mask
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, context_lengths

BLANK: str = "The cat [MASK] the mat <sop> sat on <eop>"
QUESTION: str = "who sat on the mat"
CONFIG = {"embed_dim": 16, "num_heads": 2, "ffn_dim": 32, "norm_eps": 1e-5}
FAINT, STRONG = -2, 1  # the scale of the derivatives, powers of ten


class FlowData(NamedTuple):
    """What three masks allow, and what flows through a model under each."""

    words: list[str]  # T of them
    contexts: list[int]  # the length of the context, one per mask
    masks: list[Tensor]  # each (T, T), True = visible
    sizes: list[Tensor]  # each (T, T), of d logits_t / d embedding_s
    num_layers: int


class ExtensionData(NamedTuple):
    """How far a model's cached keys move when its context gets one more word."""

    words: list[str]  # the T words before the new one
    new_word: str
    moved: dict[str, Tensor]  # mask to (L, T), relative to the size of the key


def small_chatglm(vocabulary: list[str], num_layers: int) -> ChatGLM:
    """Make a ChatGLM with random weights, in float64, whose ids are these words."""
    ids = BlankIds(*map(vocabulary.index, ("<sop>", "[gMASK]", "[MASK]")))
    torch.manual_seed(0)
    config = ChatGLMConfig(
        **CONFIG,
        vocab_size=len(vocabulary),
        num_layers=num_layers,
        max_seq_len=len(vocabulary),
        blank_ids=ids,
    )
    return ChatGLM(config).double().requires_grad_(False)


def flow_sizes(
    model: ChatGLM, tokens: Int[Tensor, "1 T"], mask: Bool[Tensor, "1 1 T T"]
) -> Float[Tensor, "T T"]:
    """Differentiate the logits of each token by the embedding of each token."""

    def logits(embedded: Tensor) -> Tensor:
        hook = model.embedding.register_forward_hook(lambda *_: embedded)
        try:
            return model(tokens, mask=mask)
        finally:
            hook.remove()

    jacobian = torch.func.jacrev(logits)(model.embedding(tokens))  # (1, T, V, 1, T, D)
    return torch.linalg.vector_norm(jacobian[0, :, :, 0], dim=(1, 3))


def flow_data(num_layers: int = 3) -> FlowData:
    """Fill in a blank under the causal mask, the prefix mask and the full one."""
    words = BLANK.split()
    vocabulary = [*words, "[gMASK]"]
    model = small_chatglm(vocabulary, num_layers)
    tokens = torch.tensor([[vocabulary.index(word) for word in words]])
    context = int(context_lengths(tokens, model.config.blank_ids.sop))
    contexts = [0, context, len(words)]
    masks = [prefix_mask(torch.tensor([c]), len(words)) for c in contexts]
    sizes = [flow_sizes(model, tokens, mask) for mask in masks]
    return FlowData(words, contexts, [m[0, 0] for m in masks], sizes, num_layers)


def extension_data(num_layers: int = 4, new_word: str = "today") -> ExtensionData:
    """Read a context twice, the second time with one more word; compare the caches."""
    words = QUESTION.split()
    vocabulary = [*words, new_word, "[gMASK]", "<sop>", "[MASK]"]
    model = small_chatglm(vocabulary, num_layers)
    moved = {}
    for name in ("causal", "prefix LM"):
        keys = []
        for added in ([], [new_word]):
            text = [*words, *added, "[gMASK]", "<sop>"]
            tokens = torch.tensor([[vocabulary.index(word) for word in text]])
            cache = model.new_cache(*tokens.shape)
            given = causal_mask(len(text)) if name == "causal" else None
            model(tokens, cache, mask=given)
            layers = [layer.keys[0, :, : len(words)] for layer in cache if layer]
            keys.append(torch.stack(layers))  # (L, N, T, H)
        size = torch.linalg.vector_norm(keys[0], dim=(1, 3))
        moved[name] = torch.linalg.vector_norm(keys[1] - keys[0], dim=(1, 3)) / size
    return ExtensionData(words, new_word, moved)


def draw_flow(data: FlowData) -> BookFigure:
    """Draw each mask, and beside it the derivatives inside the mask's outline."""
    rows = len(data.masks)
    figure, axes = panels(rows, 2, height=9.6, sharex=True, sharey=True)
    shade = Normalize(vmin=FAINT, vmax=STRONG)
    names = ("causal", "prefix LM", "full")
    for row, (context, mask, size) in enumerate(
        zip(data.contexts, data.masks, data.sizes, strict=True)
    ):
        left, right = axes[2 * row : 2 * row + 2]
        rule = mask.int()
        rule[:, :context] *= 2  # seen because it is in the context
        colours = ListedColormap(["white", BLUE, SKY])
        left.imshow(rule.numpy(), cmap=colours, vmin=0, vmax=2)
        left.set_title(f"{names[row]}, context {context}")
        if 0 < context < len(mask):
            left.text(
                context / 2 - 0.5,
                (len(mask) - 1) / 2,
                "context",
                ha="center",
                va="center",
            )
        table = torch.where(size > 0, size.log10(), torch.nan)
        right.imshow(table.numpy(), norm=shade, cmap="viridis_r")
        right.set_title(f"flow, {data.num_layers} layers")
        for ax in (left, right):
            _outline(ax, mask)
            _name_axes(ax, data.words)
    for ax in axes[-2:]:
        ax.set_xlabel("looked at")
    for ax in axes[::2]:
        ax.set_ylabel("who looks")
    scale = ScalarMappable(shade, cmap="viridis_r")
    bar = figure.colorbar(
        scale,
        ax=axes,
        location="bottom",
        ticks=[FAINT, -1, 0, STRONG],
        aspect=36,
        pad=0.01,
    )
    bar.set_label("flow: size of the derivative; white is exactly 0")
    bar.ax.set_xticklabels(["0.01", "0.1", "1", "10"])
    return figure


def draw_extension(data: ExtensionData) -> BookFigure:
    """Draw which cached keys are still right after the context got one more word."""
    figure, axes = panels(len(data.moved), 1, height=4.9, sharex=True)
    colours = ListedColormap([SKY, ORANGE])
    for ax, (name, moved) in zip(axes, data.moved.items(), strict=True):
        changed = moved > 1e-9  # rounding leaves less, a change far more
        ax.imshow(changed.int().numpy(), cmap=colours, vmin=0, vmax=1, origin="lower")
        ax.set_aspect("auto")
        layers, count = changed.shape
        for y in range(layers):
            for x in range(count):
                word, ink = ("moved", "white") if changed[y, x] else ("same", INK)
                ax.text(x, y, word, ha="center", va="center", color=ink)
        ax.set_title(f"{name}: {int((~changed).sum())} of {changed.numel()} keys kept")
        ax.set_yticks(range(layers), [str(y + 1) for y in range(layers)])
        ax.set_ylabel("layer")
        ax.set_xticks(range(count), data.words)
        _grid(ax, count, layers)
    axes[-1].set_xlabel(f"cached words; then “{data.new_word}” was added behind them")
    return figure


def _name_axes(ax: Axes, words: list[str]) -> None:
    ax.set_xticks(range(len(words)), words, rotation=90)
    ax.set_yticks(range(len(words)), words)
    _grid(ax, len(words), len(words))


def _grid(ax: Axes, columns: int, rows: int) -> None:
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for x in range(columns + 1):
        ax.plot([x - 0.5] * 2, [-0.5, rows - 0.5], color="white", lw=1.2)
    for y in range(rows + 1):
        ax.plot([-0.5, columns - 0.5], [y - 0.5] * 2, color="white", lw=1.2)


def _outline(ax: Axes, mask: Tensor) -> None:
    """Draw the border of what a mask shows: for each row, up to where it sees."""
    size = len(mask)
    ends = [int(row.nonzero().max()) + 0.5 for row in mask]
    corners = [(-0.5, -0.5), (ends[0], -0.5), (ends[0], 0.5)]
    for y, end in enumerate(ends[1:], start=1):
        corners += [(end, y - 0.5), (end, y + 0.5)]
    corners += [(-0.5, size - 0.5), (-0.5, -0.5)]
    xs, ys = zip(*corners, strict=True)
    ax.plot(xs, ys, color=INK, lw=1.8, zorder=3)
    square = ([-0.5, size - 0.5, size - 0.5], [-0.5, -0.5, size - 0.5])
    ax.plot(*square, color=GREY, lw=1, zorder=2.5)
