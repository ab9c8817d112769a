"""Pictures of the pipeline: its call graph, and what a conversation sends again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from annotated_src.figures.calls import Record, code_of, count_lines
from annotated_src.figures.style import (
    AMBER,
    BLUE,
    GREY,
    GREY_INK,
    INK,
    PALE_ORANGE,
    BookFigure,
    panels,
)
from annotated_src.generate import generate
from annotated_src.pipeline import TextGeneration

_LLAMA = "transformers.models.llama.modeling_llama:"
_GENERATE = "transformers.generation.utils:GenerationMixin."
_TEMPLATE = "transformers.utils.chat_template_utils:"
_PIPELINE = "transformers.pipelines.base:Pipeline."
_TEXT = "transformers.pipelines.text_generation:TextGenerationPipeline."
_BASE = "transformers.tokenization_utils_base:PreTrainedTokenizerBase."
_FAST = "transformers.tokenization_utils_tokenizers:TokenizersBackend."
_CACHE = "transformers.cache_utils:"
_STOP = "transformers.generation.stopping_criteria:"

TWINS: dict[str, str | None] = {
    "TextGeneration.__call__": _PIPELINE + "__call__",
    "_is_one": _TEMPLATE + "is_valid_message",
    "TextGeneration.preprocess": _TEXT + "preprocess",
    "TextGeneration.encode": _BASE + "__call__",
    "TextTokenizer.chat": _BASE + "apply_chat_template",
    "render_chat": _TEMPLATE + "render_jinja_template",
    "plain_messages": _TEMPLATE + "_plain_template_data",
    "_plain_message": _TEMPLATE + "_alias_reasoning_fields",
    "_environment": _TEMPLATE + "_cached_compile_jinja_template",
    "TextTokenizer.encode": _FAST + "_encode_plus",
    "TextTokenizer.pad": "transformers.pipelines.base:pad_collate_fn",
    "TextGeneration.forward": _PIPELINE + "forward",
    "TextGeneration._on_device": _PIPELINE + "_ensure_tensor_on_device",
    "generate": _GENERATE + "generate",
    "generate_stream": _GENERATE + "_validate_generated_length",
    "_stop_table": _STOP + "EosTokenCriteria.__init__",
    "_check_padding": None,  # lines of generate
    "_decode": _GENERATE + "_sample",
    "Llama.new_cache": _GENERATE + "_prepare_cache_for_generation",
    "new_caches": None,  # theirs has no layers before there are keys
    "LayerCache.__init__": _CACHE + "DynamicLayer.lazy_initialization",
    "greedy": None,  # a line of _sample
    "_checked": None,  # theirs do not check
    "Llama.forward": _LLAMA + "LlamaModel.forward",
    "Llama.score": _LLAMA + "LlamaForCausalLM.forward",
    "TokenEmbedding.forward": "torch.nn:Embedding.forward",
    "place_causally": None,  # lines of LlamaModel.forward
    "cached_length": _CACHE + "Cache.get_seq_length",
    "padded_positions": _GENERATE + "_prepare_position_ids_for_generation",
    "padded_causal_mask": "transformers.masking_utils:create_causal_mask",
    "causal_mask": "transformers.masking_utils:sdpa_mask",
    "Llama.frequencies": None,  # lines of LlamaRotaryEmbedding.__init__
    "rope_frequencies": _LLAMA + "LlamaRotaryEmbedding.compute_default_rope_parameters",
    "scale_frequencies": "transformers.modeling_rope_utils:_compute_llama3_parameters",
    "rope_tables": _LLAMA + "LlamaRotaryEmbedding.forward",
    "LlamaBlock.forward": _LLAMA + "LlamaDecoderLayer.forward",
    "RMSNorm.forward": _LLAMA + "LlamaRMSNorm.forward",
    "Attention.forward": _LLAMA + "LlamaAttention.forward",
    "Attention.split_heads": None,  # three lines of LlamaAttention.forward
    "apply_rotary": _LLAMA + "apply_rotary_pos_emb",
    "_split_rotary": None,  # for models that turn a part of each head
    "rotate_half": _LLAMA + "rotate_half",
    "LayerCache.append": _CACHE + "DynamicLayer.update",
    "attend": _LLAMA + "eager_attention_forward",
    "attend_fused": "transformers.integrations.sdpa_attention:sdpa_attention_forward",
    "repeat_kv": _LLAMA + "repeat_kv",
    "GatedFeedForward.forward": _LLAMA + "LlamaMLP.forward",
    "silu": "transformers.activations:SiLUActivation.forward",
    "TextGeneration.postprocess": _TEXT + "postprocess",
    "stream_text": "transformers.generation.streamers:TextStreamer.put",
    "TextTokenizer.decode": _FAST + "_decode",
    "TextTokenizer.settled": None,  # ChatGLM's clean-up needs it
    "_may_go_on": None,  # other vocabularies need it
}
"""Our functions, and the functions of transformers that they stand for."""


class TreeRow(NamedTuple):
    """A box of the call graph."""

    depth: int
    name: str
    calls: int
    lines: int
    twin: str  # without its module; "" where there is none
    twin_calls: int
    twin_lines: int
    twin_place: str  # said where it was not called


def tree_data(
    ours: Record, theirs: Record, root: str = "", leaves: Sequence[str] = ()
) -> list[TreeRow]:
    """List the functions that ran under root, each below its caller.

    leaves are drawn without what they call. One that is called from two places of the
    same caller is one row.
    """
    rows = []
    for path in _nested(list(ours.counts)):
        start = path.index(root) if root in path else 0 if not root else None
        if start is None or any(name in leaves for name in path[start:-1]):
            continue
        symbol = TWINS.get(path[-1])
        twin = symbol.partition(":")[2] if symbol else ""
        rows.append(
            TreeRow(
                len(path) - 1 - start,
                path[-1],
                ours.counts[path],
                count_lines([ours.codes[path]]),
                twin,
                theirs.calls(twin),
                count_lines([code_of(symbol)]) if symbol else 0,
                "in torch" if (symbol or "").startswith("torch") else "not here",
            )
        )
    return rows


def _nested(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Order paths so that each stands below its caller, first calls first."""
    place = {path: i for i, path in enumerate(paths)}
    return sorted(
        paths, key=lambda path: [place[path[:n]] for n in range(1, len(path) + 1)]
    )


# All across is 5; up and down, a row is 1.
STEP, RIGHT, SCALE = 0.13, 3.75, 90  # lines of code to 1 across
LARGE, SMALL = 15, 13  # points; twins are in the smaller
TWIN_INK = "#8A3D00"


def draw_tree(rows: Sequence[TreeRow]) -> BookFigure:
    """Draw one box under the other: ours, its twin, how often, and how many lines."""
    figure, (ax,) = panels(height=0.69 * (len(rows) + 1))
    ax.set(xlim=(0, 5.0), ylim=(len(rows) + 0.1, -0.85))
    ax.axis("off")
    heads = (
        (0.02, "ours", BLUE),
        (0.55, "stands for", TWIN_INK),
        (RIGHT, "lines", INK),
    )
    for x, words, colour in heads:
        ax.text(x, -0.25, words, color=colour, size=LARGE, weight="bold")
    last: dict[int, int] = {}  # the row of the latest box of each depth
    for y, row in enumerate(rows):
        last[row.depth] = y
        if row.depth:
            _branch(ax, row.depth, last[row.depth - 1], y)
        _box(ax, row, y)
    return figure


def _branch(ax: Axes, depth: int, above: int, y: int) -> None:
    x = STEP * (depth - 1) + 0.06
    ax.plot([x, x, x + 0.08], [above + 0.86, y + 0.42, y + 0.42], color=GREY, lw=0.9)


def _box(ax: Axes, row: TreeRow, y: int) -> None:
    left = STEP * row.depth
    box = FancyBboxPatch(
        (left + 0.03, y + 0.03),
        RIGHT - 0.12 - left,
        0.78,
        boxstyle="round,pad=0.02,rounding_size=0.06",
        facecolor="#E8F1F8",
        edgecolor="none",
        mutation_aspect=2,
    )
    ax.add_patch(box)
    end = RIGHT - 0.1
    short = row.name.replace("TextGeneration.", "") if row.depth else row.name
    ax.text(left + 0.07, y + 0.36, short, size=LARGE, color=INK, weight="bold")
    ax.text(end, y + 0.36, f"×{row.calls}", size=LARGE, color=BLUE, ha="right")
    if row.twin:
        times = f"×{row.twin_calls}" if row.twin_calls else row.twin_place
        words = _fitting(row.twin, RIGHT - 0.25 - left - 0.07 * len(times))
        ax.text(left + 0.07, y + 0.73, words, size=SMALL, color=TWIN_INK)
        ax.text(end, y + 0.73, times, size=SMALL, color=TWIN_INK, ha="right")
    else:
        words = "no function of its own"
        ax.text(left + 0.07, y + 0.73, words, size=SMALL, color=GREY_INK)
    for lines, up, colour in ((row.lines, 0.12, BLUE), (row.twin_lines, 0.48, AMBER)):
        if lines:
            bar = Rectangle((RIGHT, y + up), lines / SCALE * 0.3, 0.24, color=colour)
            ax.add_patch(bar)
            x = RIGHT + lines / SCALE * 0.3 + 0.04
            ax.text(x, y + up + 0.22, str(lines), size=SMALL)


def _fitting(words: str, room: float) -> str:
    """Leave the class out, and then an end, where the words are too long."""
    most = int(room / 0.078)
    if len(words) > most:
        words = "…" + words.rpartition(".")[2]
    return words if len(words) <= most else words[: most - 1] + "…"


class TurnRow(NamedTuple):
    """What one turn of a conversation sends and gets, in tokens."""

    said: str
    answer: str
    prompt: int
    shared: int  # of the prompt: with the prompt and answer of the turn before
    known: int  # of the turn before: its prompt and answer
    new: int  # of the answer, its stop id included


def chat_data(
    pipe: TextGeneration, questions: Sequence[str], max_new_tokens: int
) -> list[TurnRow]:
    """Hold a conversation, greedily; at each turn all of it is sent again."""
    messages: list[dict[str, str]] = []
    rows, before = [], []
    for said in questions:
        messages.append({"role": "user", "content": said})
        ids = pipe.encode(messages)
        out = generate(
            pipe.model, ids, max_new_tokens=max_new_tokens, stop_ids=pipe.stop_ids
        )
        (answer,) = pipe.postprocess(out[:, ids.shape[1] :])
        prompt = ids[0].tolist()
        row = (len(prompt), common_prefix(before, prompt), len(before))
        rows.append(TurnRow(said, answer, *row, out.shape[1] - ids.shape[1]))
        before = out[0].tolist()
        messages.append({"role": "assistant", "content": answer})
    return rows


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count how many items two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


READ = PALE_ORANGE


def draw_chat(rows: Sequence[TurnRow]) -> BookFigure:
    """Draw each turn as a bar of tokens: sent again, new, answered."""
    figure, (ax,) = panels(height=1.05 * len(rows) + 1.1)
    for y, row in enumerate(rows):
        parts = (
            (row.shared, READ, INK, "again"),
            (row.prompt - row.shared, BLUE, "white", "new"),
            (row.new, "white", INK, "answer"),
        )
        left = 0
        for width, fill, ink, _ in parts:
            if not width:
                continue
            edge = INK if fill == "white" else "none"
            ax.barh(y, width, 0.5, left=left, color=fill, edgecolor=edge, lw=0.8)
            ax.text(
                left + width / 2, y, str(width), color=ink, ha="center", va="center"
            )
            left += width
        ax.text(0, y - 0.34, f"{y + 1}. {row.said}")
    ax.set(ylim=(len(rows) - 0.4, -1.25), yticks=[], xlabel="tokens")
    ax.spines["left"].set_visible(False)
    for x, fill, words in (
        (0.0, READ, "read before"),
        (0.36, BLUE, "new"),
        (0.55, "white", "answered"),
    ):
        key = Rectangle(
            (x, 0.945),
            0.03,
            0.04,
            transform=ax.transAxes,
            facecolor=fill,
            edgecolor=INK if fill == "white" else "none",
        )
        ax.add_patch(key)
        ax.text(x + 0.045, 0.965, words, transform=ax.transAxes, va="center")
    return figure
