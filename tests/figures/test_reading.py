"""The numbers behind the pictures of what a decoder computes."""

from unittest.mock import patch

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from annotated_src.figures.reading import (
    draw_guesses,
    draw_notice,
    guesses_data,
    notice_data,
    token_label,
)
from annotated_src.masks import causal_mask
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.tokenizer import TextTokenizer

LETTERS = " \nabcdefgh"


@pytest.fixture
def tokenizer():
    """One token a character."""
    words = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}))
    words.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return TextTokenizer(words, chat_template="", eos_token="h")


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = Llama(LlamaConfig(10, 2, 12, 4, 2, 6, 14, 32, 1e-5, 100.0, tied_head=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.6)
    return model


def test_invisible_tokens_get_a_mark():
    words = Tokenizer(WordLevel({" ": 0, "\n": 1, "\xa0": 2, "d": 3}))
    tokenizer = TextTokenizer(words, chat_template="", eos_token="d")
    assert [token_label(tokenizer, i) for i in range(4)] == ["·", "↵", "nbsp", "d"]


def test_guesses_are_the_best_words_and_their_probabilities(model, tokenizer):
    data = guesses_data(model, tokenizer, "abca", best=3)
    assert data.words == ("a", "b", "c", "a")
    probabilities = model(tokenizer.encode("abca"))[0].softmax(-1).detach()
    assert data.probabilities.shape == (3, 3)
    for t, (row, found) in enumerate(
        zip(data.guesses, data.probabilities, strict=True)
    ):
        assert found.tolist() == sorted(found.tolist(), reverse=True)
        for word, share in zip(row, found.tolist(), strict=True):
            plain = word.replace("·", " ").replace("↵", "\n")
            assert share == pytest.approx(float(probabilities[t, LETTERS.index(plain)]))


def test_what_came_true_is_the_token_after(model, tokenizer):
    guessed = guesses_data(model, tokenizer, "abca", best=10)
    figure = draw_guesses(guessed)
    for i, ax in enumerate(figure.axes):
        bold = [t.get_text() for t in ax.texts if t.get_weight() == "bold"]
        assert bold == [guessed.words[i + 1]]


def test_a_swap_is_noticed_from_its_place_on(model, tokenizer):
    data = notice_data(model, tokenizer, "abcd", ["b", "c", " ", "e"])
    assert data.words == ("a", "b", "c", "d")
    assert data.swaps == ("b", "c", "·", "e")
    assert (data.moved.tril(-1) == 0).all()
    assert (data.moved.triu()[torch.ones(4, 4).triu() == 1] > 0).all()
    assert (data.moved <= 1).all()
    draw_notice(data)


def test_without_the_mask_earlier_words_notice(model, tokenizer):
    with patch(
        "annotated_src.placement.causal_mask",
        lambda *sizes: torch.ones_like(causal_mask(*sizes)),
    ):
        data = notice_data(model, tokenizer, "abcd", ["b", "c", "d", "e"])
    assert (data.moved > 0).all()


def test_half_the_absolute_difference_moves(model, tokenizer):
    data = notice_data(model, tokenizer, "abc", ["d", "e", "f"])
    before, after = (
        model(tokenizer.encode(text))[0, -1].detach().softmax(-1)
        for text in ("abc", "aec")
    )
    gained = (after - before).clamp(min=0).sum().item()
    assert float(data.moved[1, 2]) == pytest.approx(gained, rel=1e-4)
    assert LETTERS[int(after.argmax())] == data.says[1].replace("·", " ").replace(
        "↵", "\n"
    )


@pytest.mark.parametrize("swaps", [["b"], ["b", "c", "de", "e"]])
def test_one_token_stands_in_for_one(model, tokenizer, swaps):
    with pytest.raises(ValueError, match="one token for each of 4"):
        notice_data(model, tokenizer, "abcd", swaps)
