"""Figures of the chapter on P-tuning: where a prefix stands, how much it is seen."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.attention_by_layer import restore_scores, scores_by_layer
from annotated_src.figures.style import ORANGE, BookFigure, panels
from annotated_src.models.chatglm import ChatGLM
from annotated_src.rotary_2d import rotation


class PlaceData(NamedTuple):
    """Scores of one query vector at every place, with one key vector."""

    prefix: Tensor  # (T,) the key in the prefix, not turned
    tokens: Tensor  # (T, T) the key as a token, at every place


class MassData(NamedTuple):
    """The share of attention that goes to the prefix."""

    words: Sequence[str]  # (T)
    before: Tensor  # (layers, N, T)
    after: Tensor  # (layers, N, T)


def place_data(num_places: int = 12) -> PlaceData:
    """Put one random query and one random key, 32 features each, at every place."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    places = torch.arange(num_places)
    positions = torch.stack((places, torch.zeros_like(places)))[None]  # (1, 2, T)
    turn = rotation(positions, 32, torch.float64)
    queries = turn(query.expand(1, 1, num_places, -1))
    keys = turn(key.expand(1, 1, num_places, -1))
    return PlaceData((queries @ key)[0, 0], (queries @ keys.mT)[0, 0])


@torch.no_grad()
def prefix_mass(
    model: ChatGLM, tokens: Int[Tensor, "B T"]
) -> Float[Tensor, "B layers N T"]:
    """Sum the weights that each token gives to the prefix, in every layer and head."""
    calls = []
    hooks = [
        block.get_submodule("attention").register_forward_pre_hook(
            lambda *call: calls.append(call)
        )
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    masses = []
    for attention, (x, rotate, mask, cache) in calls:
        queries, _, _ = attention.split_heads(attention.qkv_proj(x))
        keys = cache.keys[:, :, : cache.length]  # the prefix, then the turned tokens
        scores = scores_by_layer(rotate(queries), keys, attention.layer)
        weights = restore_scores(scores, mask, attention.layer).softmax(dim=-1)
        masses.append(weights[..., : model.config.prefix_len].sum(dim=-1))
    return torch.stack(masses, dim=1)


def mass_data(
    before: ChatGLM, after: ChatGLM, tokens: Int[Tensor, "1 T"], words: Sequence[str]
) -> MassData:
    """Compare a prefix before and after its training, on one line of text."""
    masses = [prefix_mass(model, tokens)[0] for model in (before, after)]
    return MassData(words, *masses)


def draw_places(data: PlaceData) -> BookFigure:
    """Draw the scores as a map, the prefix as a column apart."""
    figure, (ax,) = panels(height=4.9)
    size = len(data.tokens)
    table = torch.full((size, size + 2), torch.nan)
    table[:, 0], table[:, 2:] = data.prefix, data.tokens
    image = ax.imshow(table.numpy(), cmap="cividis")
    for column in (0, 2):
        corner = (column - 0.5, -0.5)
        box = Rectangle(
            corner, 1, size, fill=False, edgecolor=ORANGE, lw=3, clip_on=False
        )
        ax.add_patch(box)
    ax.set_xticks([0, *range(2, size + 2)], ["prefix", *map(str, range(size))])
    ax.set_yticks(range(size))
    ax.spines[:].set_visible(False)
    ax.set(xlabel="where the key stands", ylabel="the query's place")
    ax.set_title("Outlined: the same numbers")
    figure.colorbar(image, ax=ax, shrink=0.8).set_label("score")
    return figure


def draw_mass(data: MassData) -> BookFigure:
    """Draw a row per head and a column per word, before training and after."""
    figure, axes = panels(2, 1, height=6.4, sharex=True)
    layers, heads, columns = data.before.shape
    shade = Normalize(vmin=0, vmax=1)
    for ax, mass, when in zip(
        axes, (data.before, data.after), ("Before", "After"), strict=True
    ):
        ax.imshow(mass.flatten(0, 1).numpy(), cmap="cividis", norm=shade, aspect="auto")
        for layer in range(1, layers):
            ax.axhline(layer * heads - 0.5, color="white", lw=5)
        names = [f"head {head}" for head in range(1, heads + 1)]
        ax.set_yticks(range(layers * heads), names * layers)
        gap = " " * 14  # so that each name stands beside its layer's rows
        ax.set_ylabel(gap.join(f"layer {layer}" for layer in range(layers, 0, -1)))
        ax.set_title(f"{when} training")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[1].set_xticks(range(columns), list(data.words), rotation=45, ha="right")
    bar = figure.colorbar(
        ScalarMappable(shade, cmap="cividis"),
        ax=axes,
        location="bottom",
        ticks=[0, 0.5, 1],
        aspect=36,
        pad=0.01,
    )
    bar.set_label("share of a word's attention that goes to the prefix")
    bar.ax.set_xticklabels(["0 %", "50 %", "100 %"])
    return figure
