"""The call graph that the chapter draws, and what a conversation sends again."""

import itertools

import pytest
import transformers
from matplotlib.patches import FancyBboxPatch

from annotated_src.figures.calls import code_of, record
from annotated_src.figures.pipeline import (
    TWINS,
    chat_data,
    common_prefix,
    draw_chat,
    draw_tree,
    tree_data,
)
from annotated_src.gguf_to_hf import convert_gguf
from annotated_src.pipeline import TextGeneration

CHAT = [{"role": "user", "content": "for what?"}]
STEPS = 7


@pytest.fixture(scope="module")
def pipes(make_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "small"
    convert_gguf(make_gguf().path, path, lambda line: None)
    theirs = transformers.pipeline("text-generation", model=str(path), device="cpu")
    return TextGeneration.from_pretrained(path), theirs


@pytest.fixture(scope="module")
def records(pipes):
    ours, theirs = pipes
    return (
        record("annotated_src", lambda: ours(CHAT, max_new_tokens=STEPS)),
        record(
            "transformers",
            lambda: theirs(CHAT, do_sample=False, max_new_tokens=STEPS),
        ),
    )


@pytest.mark.parametrize("symbol", sorted(filter(None, set(TWINS.values()))))
def test_every_twin_is_there(symbol):
    assert code_of(symbol).co_qualname == symbol.partition(":")[2]


def test_the_table_knows_every_function_that_runs(records):
    assert {path[-1] for path in records[0].counts} <= set(TWINS)


def test_the_twins_run_in_transformers_too(records):
    """But for those that other settings would call."""
    ours, theirs = records
    ran = {path[-1] for path in ours.counts}
    silent = {
        name for name in ran if (s := TWINS[name]) and not theirs.calls(s.split(":")[1])
    }
    assert silent <= {
        "TextTokenizer.pad",  # theirs, when a batch is asked for
        "TokenEmbedding.forward",  # theirs is torch's
        "_environment",  # theirs, kept from an earlier call
        "rope_frequencies",  # theirs, once, when the model is made
        "scale_frequencies",  # theirs, when the config asks for it
        "stream_text",  # theirs, when there is a streamer
        "attend",
        "repeat_kv",  # theirs, in its eager attention
    }


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("LlamaBlock.forward", "LlamaDecoderLayer.forward"),
        ("RMSNorm.forward", "LlamaRMSNorm.forward"),
        ("Attention.forward", "LlamaAttention.forward"),
        ("rotate_half", "rotate_half"),
        ("LayerCache.append", "DynamicLayer.update"),
        ("GatedFeedForward.forward", "LlamaMLP.forward"),
        ("Llama.forward", "LlamaModel.forward"),
    ],
)
def test_the_model_s_parts_run_equally_often(records, mine, theirs):
    assert records[0].calls(mine) == records[1].calls(theirs) > 0


def test_the_tree_is_what_ran(records):
    rows = tree_data(*records)
    assert rows[0].name == "TextGeneration.__call__"
    assert [row.depth for row in rows].count(0) == 1
    steps = [row.name for row in rows if row.depth == 1]
    assert [name.rpartition(".")[2] for name in steps][-3:] == [
        "preprocess",
        "forward",
        "postprocess",
    ]
    assert len(rows) == len(records[0].counts)
    assert sum(row.calls for row in rows) == sum(records[0].counts.values())
    for above, row in itertools.pairwise(rows):
        assert row.depth <= above.depth + 1


def test_roots_and_leaves_cut_the_tree(records):
    whole = tree_data(*records)
    outer = tree_data(*records, leaves=["Llama.forward"])
    inner = tree_data(*records, root="Llama.forward")
    assert inner[0].name == outer[-1].name or inner[0].depth == 0
    assert len(outer) + len(inner) - 1 == len(whole)
    assert "LlamaBlock.forward" not in {row.name for row in outer}
    assert [row.depth for row in inner].count(0) == 1


def test_every_row_is_drawn_and_no_words_overlap(records):
    rows = tree_data(*records)
    figure = draw_tree(rows)
    (ax,) = figure.axes
    assert sum(isinstance(p, FancyBboxPatch) for p in ax.patches) == len(rows)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in ax.texts]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        # In pixels, of 150 to an inch; the extent of a text has some air above.
        assert across <= 1 or along <= 4, (one, other)


def test_a_conversation_sends_what_was_sent_before(pipes):
    pipe, _ = pipes
    rows = chat_data(pipe, ["for what?", "and then?", "why?"], 12)
    assert rows[0].shared == rows[0].known == 0
    messages = []
    for row in rows:
        messages.append({"role": "user", "content": row.said})
        assert pipe.encode(messages).shape[1] == row.prompt
        assert pipe(messages, max_new_tokens=12) == row.answer
        messages.append({"role": "assistant", "content": row.answer})
    for before, row in itertools.pairwise(rows):
        assert row.known == before.prompt + before.new
        assert before.prompt - 1 <= row.shared <= row.known
    (ax,) = draw_chat(rows).axes
    words = {text.get_text() for text in ax.texts}
    assert {str(row.prompt - row.shared) for row in rows} <= words
    assert {f"{i}. {row.said}" for i, row in enumerate(rows, 1)} <= words


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == common_prefix([1, 2], [1, 2]) == 2
