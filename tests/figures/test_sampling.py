"""The numbers behind the pictures of choosing a token."""

import pytest
import torch
from matplotlib.colors import to_hex

from annotated_src.figures.sampling import (
    draw_cuts,
    draw_loop,
    draw_strips,
    hit,
    loop_data,
    strip_data,
)
from annotated_src.figures.style import ORANGE
from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.sampling import min_p, temperature, top_k, top_p
from annotated_src.scoring import token_log_probs

SHARES = torch.tensor([[0.08, 0.36, 0.04, 0.24, 0.12, 0.16]])
SORTED = torch.tensor([0.36, 0.24, 0.16, 0.12, 0.08, 0.04]).double()
FILTERS = {
    "top-k 2": lambda logits: top_k(logits, 2),
    "top-p 0.7": lambda logits: top_p(logits, 0.7),
    "min-p 0.3": lambda logits: min_p(logits, 0.3),
}


def decode(ids):
    return f" {'abcdef'[ids[0]]}"


@pytest.fixture
def data():
    return strip_data("Say", SHARES.log(), decode, FILTERS)


def test_strips_are_sorted_cut_and_stretched(data):
    assert data.words == ("b", "d", "f", "e", "a", "c")
    torch.testing.assert_close(data.before, SORTED, atol=1e-7, rtol=0)
    assert [strip.kept for strip in data.strips] == [2, 3, 4]
    for strip in data.strips:
        kept = SORTED[: strip.kept]
        assert strip.mass == pytest.approx(kept.sum().item())
        expected = torch.zeros(6).double()
        expected[: strip.kept] = kept / kept.sum()
        torch.testing.assert_close(strip.shares, expected, atol=1e-7, rtol=0)


def test_temperature_keeps_the_order_and_all_tokens():
    even = {"temperature 2": lambda logits: temperature(logits, 2.0)}
    (strip,) = strip_data("Say", SHARES.log(), decode, even).strips
    roots = SORTED.sqrt()
    assert strip.kept == 6
    assert strip.mass == pytest.approx(1)
    torch.testing.assert_close(strip.shares, roots / roots.sum(), atol=1e-7, rtol=0)


def test_a_dart_hits_the_token_that_lies_there():
    points = (0.0, 0.35, 0.37, 0.59, 0.61, 0.97)
    assert [hit(SORTED, u) for u in points] == [0, 0, 1, 1, 2, 5]


def test_strips_say_what_they_show(data):
    figure = draw_strips([data, data], ghosts=True)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert "2 tokens stay, which had 60%" in said
    assert "3 tokens stay, which had 76%" in said
    assert {"b", "d"} <= set(said)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["“Say …”"] * 2


def test_a_strip_shows_segments_as_wide_as_their_shares(data):
    (ax,) = draw_strips([data]).axes
    widths = [patch.get_width() for patch in ax.patches[:2]]
    assert widths == pytest.approx([0.6, 0.4], abs=1e-6)


def test_what_has_come_is_marked_and_its_share_said():
    both = {"as it was": lambda x: x, "punished": lambda x: x - came * 9.0}
    came = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 1.0]])  # the first and the third
    text = torch.tensor([[1, 5, 1]])
    penalised = strip_data("Say", SHARES.log(), decode, both, come=text)
    assert penalised.come.tolist() == [True, False, True, False, False, False]
    (ax,) = draw_strips([penalised]).axes
    said = [words.get_text() for words in ax.texts]
    assert "52% for what has come already" in said
    assert "0% for what has come already" in said
    orange = [to_hex(patch.get_facecolor()) == ORANGE.lower() for patch in ax.patches]
    widths = [patch.get_width() for patch in ax.patches]
    # After the penalty, those too narrow to see are one block; the others close ranks.
    assert orange == [True, False, True, *[False] * 8]
    assert [bool(patch.get_hatch()) for patch in ax.patches] == orange
    assert widths[:6] == pytest.approx(SORTED.tolist(), abs=1e-6)
    assert widths[6] == pytest.approx(0.5, abs=1e-3)


def test_a_blank_token_can_be_seen():
    blanks = strip_data(
        "Say", torch.zeros(1, 3), lambda ids: (" ", "\n ", " a")[ids[0]], {}
    )
    assert sorted(blanks.words) == sorted(("␣", "↵␣", "a"))


def test_a_tail_is_one_block_and_says_how_long_it_is():
    logits = torch.cat([torch.tensor([9.0]), torch.zeros(1000)])[None]
    both = {"all": lambda x: x, "half": lambda x: temperature(x, 2.0)}
    tail = strip_data("Say", logits, str, both)
    (ax,) = draw_strips([tail], dart=0.95).axes
    said = [text.get_text() for text in ax.texts]
    assert "1,000 more" in said
    assert any(words.startswith("best 89%, u = 0.95 is") for words in said)
    rank = hit(tail.strips[1].shares, 0.95)
    assert any(f"“{tail.words[rank]}”" in words for words in said)


def test_a_dart_beyond_the_known_words_says_the_place():
    many = strip_data("Say", torch.zeros(1, 4000), str, {"all": lambda x: x})
    (ax,) = draw_strips([many], dart=0.75).axes
    assert any("no. 3,001" in text.get_text() for text in ax.texts)


def test_cuts_end_where_the_filter_cut(data):
    figure = draw_cuts([data, data])
    said = [{text.get_text() for text in ax.texts} for ax in figure.axes]
    assert said == [{"keeps 2"}, {"keeps 3"}, {"keeps 4"}]
    for ax, kept in zip(figure.axes, (2, 3, 4), strict=True):
        assert ax.lines[2].get_xdata()[0] == kept  # the dot
    assert figure.axes[1].lines[2].get_ydata()[0] == pytest.approx(0.76)
    assert figure.axes[2].lines[2].get_ydata()[0] == pytest.approx(1 / 3)
    assert figure.axes[2].lines[6].get_ydata()[0] == 0.3  # the dashed line


def test_loop_gathers_the_chances_of_each_time():
    config = LlamaConfig(31, 2, 12, 6, 2, 4, 20, 64, 1e-5, 10_000.0, False)
    model = Llama(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens = generate(model, torch.tensor([[3, 1, 4]]), max_new_tokens=12)
    data = loop_data(model, tokens, ("a", "b", "c"), times=4)
    scores = token_log_probs(model, tokens)[0].exp()
    assert data.chances.shape == (4, 3)
    torch.testing.assert_close(data.chances.flatten().float(), scores[2:])
    (ax,) = draw_loop(data).axes
    assert [text.get_text() for text in ax.texts] == ["1st time", "4th time"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
