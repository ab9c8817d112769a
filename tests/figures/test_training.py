"""The numbers behind the pictures of training."""

import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from annotated_src.figures.training import (
    COLUMNS,
    LINES,
    Baselines,
    Reading,
    baselines,
    draw_loss,
    draw_readings,
    held_out_loss,
    loss_data,
    reading_data,
    visible,
)
from annotated_src.loss import next_token_loss
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.tokenizer import TextTokenizer


def small():
    return Llama(LlamaConfig(258, 2, 12, 6, 2, 4, 20, 64, 1e-5, 1e4, False))


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary of single bytes, a token that ends a text, and one pair."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<end>", *alphabet, "th"])}
    bpe = Tokenizer(models.BPE(ids, [("t", "h")]))
    bpe.add_special_tokens(["<end>"])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return TextTokenizer(bpe, None, "<end>")


def test_baselines_are_what_counting_by_hand_gives():
    train = torch.tensor([0, 1, 0, 2, 0, 1, 0])
    held_out = torch.tensor([[0, 1, 2], [3, 2, 0]])  # nothing is asked from 2 to 3
    counts, pairs = (
        Counter(train.tolist()),
        Counter(zip(train.tolist(), train[1:].tolist(), strict=False)),
    )
    share = {v: (counts[v] + 1) / (7 + 4) for v in range(4)}
    before = Counter(train[:-1].tolist())
    follows = {
        (a, b): (pairs[a, b] + 20 * share[b]) / (before[a] + 20)
        for a in range(4)
        for b in range(4)
    }
    asked = [(0, 1), (1, 2), (3, 2), (2, 0)]
    found = baselines(train, held_out, 4)
    assert found.uniform == math.log(4)
    unigram = -sum(math.log(share[b]) for _, b in asked) / 4
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    bigram = -sum(math.log(follows[pair]) for pair in asked) / 4
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    for a in range(4):
        assert sum(follows[a, b] for b in range(4)) == pytest.approx(1)


def test_pairs_beat_frequencies_where_there_are_pairs():
    ids = torch.arange(4).repeat(300)  # each token says which is next
    found = baselines(ids, ids[None, :101], 4)
    assert found.unigram == pytest.approx(math.log(4), abs=1e-3)
    assert found.bigram < 0.1


def test_held_out_loss_is_the_loss_that_training_makes_small():
    model, tokens = small(), torch.randint(258, (3, 9))
    expected = next_token_loss(model(tokens), tokens).item()
    assert held_out_loss(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_a_reading_has_a_surprise_for_each_token_after_the_first(tokenizer):
    model = small()
    ids = torch.cat([torch.tensor([[0]]), tokenizer.encode("the\n√x")], dim=1)
    found = reading_data(model, tokenizer, ids)
    assert found.pieces == ["th", "e", "↵", "·", "·", "·", "x"]
    shares = model(ids)[0].detach().softmax(-1)
    expected = [-math.log2(shares[t, int(ids[0, t + 1])]) for t in range(7)]
    assert found.bits == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("piece", "shown"),
    [("a b", "a b"), ("\n\n", "↵↵"), ("", "∎"), ("\x07\ufffd", "··"), ("’", "’")],
)
def test_every_character_has_one_column(piece, shown):
    assert visible(piece) == shown
    assert len(visible(piece)) == max(1, len(piece))


def run():
    losses = [7.0 - 0.01 * step for step in range(200)]
    counted = Baselines(6.9, 6.0, 4.3)
    return loss_data(losses, {0: 7.1, 10: 6.5, 100: 6.0, 200: 5.5}, counted, 3.0)


def test_the_loss_figure_shows_both_curves_and_three_yardsticks():
    data = run()
    figure = draw_loss(data)
    (ax,) = figure.axes
    *dashed, train, held_out = ax.lines
    heights = [line.get_ydata()[0] for line in dashed]
    assert heights == list(data.counted)
    assert train.get_xdata().tolist() == list(range(1, 201))
    assert train.get_ydata().tolist() == data.train.tolist()
    assert held_out.get_xdata().tolist() == [10, 100, 200]  # 0 has no logarithm
    assert held_out.get_ydata().tolist() == [6.5, 6.0, 5.5]
    assert {"knows nothing", "knows frequencies", "knows pairs"} <= {
        text.get_text() for text in ax.texts
    }


def test_the_right_axis_is_bits_a_byte():
    figure = draw_loss(run())
    figure._repr_png_()  # only drawing sets the second axis
    (ax,) = figure.axes
    (right,) = ax.child_axes
    low, high = ax.get_ylim()
    expected = [low / math.log(2) / 3, high / math.log(2) / 3]
    assert right.get_ylim() == pytest.approx(expected)


def test_a_drawn_text_has_its_characters_and_their_grounds():
    readings = {
        "one": Reading(["ab", " ", "c"], [0.0, 5.0, 99.0]),
        "two": Reading(["x" * 30] * 20, [1.0] * 20),
    }
    first, second, *_ = draw_readings(readings).axes
    assert [text.get_text() for text in first.texts] == ["a", "b", "c"]
    grounds = [patch.get_facecolor() for patch in first.patches]
    assert len(grounds) == 4
    assert grounds[0] == grounds[1] == (1, 1, 1, 1)
    assert len(set(grounds)) == 3
    assert first.get_title(loc="left") == "one"
    assert len(second.texts) == COLUMNS * LINES  # and no more


def test_more_surprise_is_darker():
    bits = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    (ax, *_) = draw_readings({"": Reading(list("abcdefg"), bits)}).axes
    light = [sum(patch.get_facecolor()[:3]) for patch in ax.patches]
    assert light[:6] == sorted(light[:6], reverse=True)
    assert len(set(light[:6])) == 6
    assert light[5] == light[6]
