"""Pictures and tables of names, of fused rows, and of what a misreading does."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.patches import Rectangle
from torch import Tensor

from annotated_src.attention import repeat_kv
from annotated_src.figures.style import AMBER, BLUE, INK, BookFigure, panels
from annotated_src.fused_qkv import join_qkv, split_qkv
from annotated_src.gguf_to_hf import GGUF_NAMES
from annotated_src.masks import causal_mask
from annotated_src.models import chatglm, gemma, llama, phi
from annotated_src.originals import META_LLAMA_NAMES, PHI_MSFT_NAMES
from annotated_src.rotary import (
    apply_rotary,
    half_split_to_interleaved,
    rope_tables,
)

FIELDS = {
    "embedding": "embedding",
    "blocks.{}.attention_norm": "pre_attn_norm",
    "blocks.{}.attention.q_proj": "attn_query_proj",
    "blocks.{}.attention.k_proj": "attn_key_proj",
    "blocks.{}.attention.v_proj": "attn_value_proj",
    "blocks.{}.attention.out_proj": "attn_output_proj",
    "blocks.{}.ffn_norm": "pre_ff_norm",
    "blocks.{}.ffn.gate_proj": "ff_gate_proj",
    "blocks.{}.ffn.up_proj": "ff_up_proj",
    "blocks.{}.ffn.down_proj": "ff_down_proj",
    "norm": "final_norm",
    "lm_head": "lm_head",
}
"""Our modules, and the fields of the on-device library's `TensorNames`."""

STONE: dict[str, Mapping[str, str]] = {
    "Llama": llama.HF_NAMES,
    "Gemma": gemma.HF_NAMES,
    "Phi": phi.HF_NAMES,
    "Phi-2, first files": PHI_MSFT_NAMES,
    "ChatGLM-6B": chatglm.HF_NAMES,
    "Llama, Meta's files": META_LLAMA_NAMES,
    "Llama in GGUF": GGUF_NAMES,
}
"""The tables of names that the loaders use: ours to theirs."""


def rosetta_data() -> dict[str, dict[str, str]]:
    """Look up each kind of module in every table: ours to column to theirs.

    Phi's one norm stands beside attention_norm; a fused matrix in three places. What a
    model does not have is an empty string.
    """
    table: dict[str, dict[str, str]] = {}
    for ours, field in FIELDS.items():
        table[ours] = {"TensorNames": field}
        for column, names in STONE.items():
            table[ours][column] = _theirs(names, ours)
    return table


def _theirs(names: Mapping[str, str], ours: str) -> str:
    fused = ours
    for part in (".q_proj", ".k_proj", ".v_proj"):
        fused = fused.replace(part, ".qkv_proj")
    other = "blocks.{}.norm" if ours == "blocks.{}.attention_norm" else fused
    for name in (ours, fused, other):
        if found := names.get(f"{name}.weight"):
            return found.removesuffix(".weight")
    return ""


def rosetta_markdown(columns: Sequence[str]) -> str:
    """Write some columns as a table; what a layer's names begin with is in the head."""
    data = rosetta_data()
    heads, rows = ["ours"], [[_short(ours, "blocks.{}.")] for ours in data]
    heads[0] += "<br>`blocks.{}.` …"
    for column in columns:
        prefix = _prefix([line[column] for line in data.values()])
        heads.append(f"{column}<br>`{prefix}` …" if prefix else column)
        for row, line in zip(rows, data.values(), strict=True):
            row.append(_short(line[column], prefix))
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prefix(names: Sequence[str]) -> str:
    layered = [name.partition("{}.")[0] for name in names if "{}." in name]
    return f"{layered[0]}{{}}." if layered else ""


def _short(name: str, prefix: str) -> str:
    if not name:
        return "–"
    within = prefix and name.startswith(prefix)
    return f"… `{name.removeprefix(prefix)}`" if within else f"`{name}`"


LOOKS = ((BLUE, "white"), (AMBER, INK), ("#BFE5D3", INK))  # of query, key, value


class RowsData(NamedTuple):
    """What stands in each row of a fused matrix: 0 query, 1 key, 2 value, and whose."""

    title: str
    kinds: Int[Tensor, "rows"]
    heads: Int[Tensor, "rows"]


def rows_data() -> list[RowsData]:
    """Join twelve labelled rows as four models would; each head is one row."""
    found = []
    for layout, num_heads, num_kv_heads in (
        ("plain", 4, 4),
        ("per head", 4, 4),
        ("plain", 8, 2),
        ("per group", 8, 2),
    ):
        sizes = (num_heads, num_kv_heads, num_kv_heads)
        kinds = [torch.full((n,), kind) for kind, n in enumerate(sizes)]
        heads = [torch.arange(n) for n in sizes]
        title = f"{layout}\n{num_heads} heads, {num_kv_heads} k/v"
        joined = (join_qkv(q, k, v, 1, layout) for q, k, v in (kinds, heads))
        found.append(RowsData(title, *joined))
    return found


def draw_rows(data: Sequence[RowsData]) -> BookFigure:
    """Draw each matrix as coloured rows, the first on top, and where its half ends."""
    figure, axes = panels(1, len(data), height=4.6)
    for ax, matrix in zip(axes, data, strict=True):
        marked = zip(matrix.kinds.tolist(), matrix.heads.tolist(), strict=True)
        for row, (kind, head) in enumerate(marked):
            fill, ink = LOOKS[kind]
            ax.add_patch(Rectangle((0, row + 0.05), 1, 0.9, color=fill))
            style = {"color": ink, "size": 13, "weight": "bold", "va": "center"}
            ax.text(0.5, row + 0.53, f"{'qkv'[kind]}{head}", style, ha="center")
        middle = len(matrix.kinds) / 2
        ax.plot((0, 1), (middle, middle), color=INK, lw=1.5, ls=(0, (4, 3)))
        ax.set(xlim=(0, 1), ylim=(len(matrix.kinds), 0))
        ax.set_title(matrix.title)
        ax.set_axis_off()
    return figure


class MapsData(NamedTuple):
    """Where one head looks, its weights read right and read wrong in two ways."""

    words: tuple[str, ...]
    right: Float[Tensor, "T T"]
    misread: Float[Tensor, "T T"]  # fused per group, read as plain
    unturned: Float[Tensor, "T T"]  # Meta's rows, not reordered


def maps_data(
    model: llama.Llama,
    tokens: Int[Tensor, "1 T"],
    words: Sequence[str],
    at: tuple[int, int],
) -> MapsData:
    """Run the model up to a layer, and one head of it with weights read three ways."""
    layer, head = at
    c, attention = model.config, model.get_submodule(f"blocks.{layer}.attention")
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        hook.remove()
    parts = [attention.get_parameter(f"{x}_proj.weight").detach() for x in "qkv"]
    fused = join_qkv(parts[0], parts[1], parts[2], c.head_dim, "per group")
    wrong = split_qkv(fused, c.num_heads, c.num_kv_heads, c.head_dim, "plain")
    rows = [to_meta_rows(w, c.head_dim) for w in parts[:2]]
    with torch.no_grad():
        maps = [_looks(model, seen[0], q, k)[head] for q, k, *_ in (parts, wrong, rows)]
    return MapsData(tuple(words), *maps)


def to_meta_rows(
    weight: Float[Tensor, "rows D"], head_dim: int
) -> Float[Tensor, "rows D"]:
    """Undo `rows_to_half_split`: lay the rows as Meta's files have them."""
    heads = weight.unflatten(0, (-1, head_dim)).transpose(1, 2)  # (heads, D, H)
    return half_split_to_interleaved(heads).transpose(1, 2).flatten(0, 1)


def _looks(model: llama.Llama, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    c, count = model.config, x.shape[1]
    tables = rope_tables(torch.arange(count)[None], model.frequencies(), x.dtype)
    q, k = (
        apply_rotary((x @ w.T).unflatten(-1, (-1, c.head_dim)).transpose(1, 2), *tables)
        for w in (queries, keys)
    )
    scores = q @ repeat_kv(k, c.num_heads // c.num_kv_heads).mT / c.head_dim**0.5
    return scores.masked_fill(~causal_mask(count), -torch.inf).softmax(-1)[0]


def draw_maps(data: MapsData) -> BookFigure:
    """Draw the three maps, a row a token, darker where it looks more."""
    figure, axes = panels(1, 3, height=2.8)
    maps = (
        ("read right", data.right),
        ("misread:\nper group as plain", data.misread),
        ("misread:\nrows as Meta's", data.unturned),
    )
    for ax, (title, weights) in zip(axes, maps, strict=True):
        ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(title)
    axes[0].set_yticks(range(len(data.words)), data.words)
    axes[0].tick_params(length=0)
    return figure
