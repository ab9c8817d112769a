from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from annotated_src.blank_infilling import (
    Example,
    draw_example,
    mask_rest,
    mask_span,
    pad_right,
)
from annotated_src.loss import IGNORE
from annotated_src.positions import BlankIds

GOLDEN = Path(__file__).parent / "golden" / "chatglm6b" / "ids.safetensors"
IDS, EOP, PAD = BlankIds(sop=244, gmask=241, mask=240), 245, 3
TEXT = list(range(10, 30))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def rebuilt(tokens):
    """The text that an example was made of, found from its ids alone."""
    tokens = tokens.tolist()
    context, answer = tokens[: tokens.index(IDS.sop)], tokens[tokens.index(IDS.sop) :]
    assert answer[-1] == EOP
    (place,) = [i for i, t in enumerate(context) if t in (IDS.mask, IDS.gmask)]
    return [*context[:place], *answer[1:-1], *context[place + 1 :]]


def text_and_blank(tokens):
    tokens = tokens[: tokens.index(EOP)]
    sop = tokens.index(IDS.sop)
    blank = next(i for i, t in enumerate(tokens) if t in (IDS.mask, IDS.gmask))
    text = [*tokens[:blank], *tokens[sop + 1 :], *tokens[blank + 1 : sop]]
    return text, blank, len(tokens) - sop - 1


def test_a_span_is_masked_as_in_the_original(golden):
    tokens = golden["mask_train/input_ids"][0]
    text, start, length = text_and_blank(tokens.tolist())
    found = mask_span(text, start, start + length, IDS, EOP)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.labels, golden["mask_train/labels"][0])


def test_the_rest_is_masked_as_in_the_original(golden):
    tokens = golden["gmask_train/input_ids"][0]
    text, start, _ = text_and_blank(tokens.tolist())
    found = mask_rest(text, start, IDS, EOP)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.labels, golden["gmask_train/labels"][0])


def test_a_batch_is_padded_as_in_the_original(golden):
    rows = golden["batch_rightpad/input_ids"].tolist()
    examples = [mask_rest(*text_and_blank(row)[:2], IDS, EOP) for row in rows]
    assert len({len(example.tokens) for example in examples}) > 1
    tokens, labels = pad_right(examples, PAD)
    torch.testing.assert_close(tokens, golden["batch_rightpad/input_ids"])
    torch.testing.assert_close(labels, golden["batch_rightpad/labels"])


def test_every_span_can_be_put_back():
    for start in range(len(TEXT)):
        assert rebuilt(mask_rest(TEXT, start, IDS, EOP).tokens) == TEXT
        for end in range(start + 1, len(TEXT) + 1):
            found = mask_span(TEXT, start, end, IDS, EOP)
            assert rebuilt(found.tokens) == TEXT
            asked = found.labels[found.labels != IGNORE].tolist()
            assert asked == [IDS.sop, *TEXT[start:end], EOP]


def test_half_of_the_blanks_are_short_and_half_are_long():
    generator = torch.Generator().manual_seed(0)
    shorts, longs, starts = Counter(), Counter(), set()
    for _ in range(4000):
        found = draw_example(TEXT, IDS, EOP, generator)
        assert rebuilt(found.tokens) == TEXT
        length = int((found.labels != IGNORE).sum()) - 2
        is_long = bool((found.tokens == IDS.gmask).any())
        (longs if is_long else shorts)[length] += 1
        if not is_long:
            starts.add(found.tokens.tolist().index(IDS.mask))
    assert 1900 < shorts.total() < 2100
    # Poisson of mean 3, given at least 1: 1 has 0.157, 2 and 3 0.236, 4 0.177.
    for length, share in {1: 0.157, 2: 0.236, 3: 0.236, 4: 0.177, 5: 0.106}.items():
        assert abs(shorts[length] / shorts.total() - share) < 0.04
    assert set(longs) == set(range(10, 21))  # of 20 tokens
    assert max(longs.values()) < 2 * min(longs.values())
    assert {0, 10, 18} <= starts


def test_draws_repeat_with_the_generator():
    def draws():
        generator = torch.Generator().manual_seed(5)
        found = [draw_example(TEXT, IDS, EOP, generator) for _ in range(20)]
        return [example.tokens.tolist() for example in found]

    assert draws() == draws()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_shortest_texts_have_blanks_too(size):
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        found = draw_example(TEXT[:size], IDS, EOP, generator)
        assert rebuilt(found.tokens) == TEXT[:size]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (3, 3, "got 3 to 3"),
        (4, 3, "got 4 to 3"),
        (-1, 2, "got -1 to 2"),
        (18, 21, "<= 20, got 18 to 21"),
    ],
)
def test_a_span_outside_the_text_is_refused(start, end, message):
    with pytest.raises(ValueError, match=message):
        mask_span(TEXT, start, end, IDS, EOP)


@pytest.mark.parametrize("start", [-1, 20])
def test_a_rest_outside_the_text_is_refused(start):
    with pytest.raises(ValueError, match=f"must be 0 to 19, got {start}"):
        mask_rest(TEXT, start, IDS, EOP)


@pytest.mark.parametrize("special", [*IDS, EOP])
def test_a_special_id_in_the_text_is_refused(special):
    text = [*TEXT, special]
    with pytest.raises(ValueError, match=f"special id {special} "):
        mask_span(text, 0, 1, IDS, EOP)
    with pytest.raises(ValueError, match=f"special id {special} "):
        mask_rest(text, 3, IDS, EOP)
    with pytest.raises(ValueError, match=f"special id {special} "):
        draw_example(text, IDS, EOP)


def test_nothing_to_work_on_is_refused():
    with pytest.raises(ValueError, match="no text"):
        draw_example([], IDS, EOP)
    with pytest.raises(ValueError, match="no examples"):
        pad_right([], PAD)
    uneven = Example(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="3 tokens with 2 labels"):
        pad_right([uneven], PAD)
