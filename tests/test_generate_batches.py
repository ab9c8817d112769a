"""Prompts of different lengths together, each answered as it is alone."""

import pytest
import torch

from annotated_src.generate import generate
from annotated_src.sampler import Sample
from annotated_src.sampling import greedy

LENGTHS = [5, 9, 1, 7]
NEW = 16


def penalised(logits, tokens):
    """Greedy under a penalty for repetition: it looks at the tokens so far."""
    return Sample(repetition_penalty=1.7, top_k=1)(logits, tokens)


@pytest.fixture
def batch():
    """Four prompts, padded on the left with an id that also occurs in them."""
    tokens = torch.randint(0, 97, (4, max(LENGTHS)))
    places = torch.arange(max(LENGTHS))
    is_token = places >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return tokens.masked_fill(~is_token, int(tokens[1, 4])), is_token


def alone(model, tokens, is_token, **options):
    rows = zip(tokens, is_token, strict=True)
    return [
        generate(model, row[real][None], max_new_tokens=NEW, **options)[0, real.sum() :]
        for row, real in rows
    ]


@pytest.mark.parametrize("sampler", [greedy, penalised])
def test_each_row_is_answered_as_it_is_alone(checkpoint, batch, sampler):
    tokens, is_token = batch
    found = generate(
        checkpoint.model, tokens, max_new_tokens=NEW, is_token=is_token, sampler=sampler
    )
    assert torch.equal(found[:, : tokens.shape[1]], tokens)
    expected = alone(checkpoint.model, tokens, is_token, sampler=sampler)
    assert found[:, tokens.shape[1] :].tolist() == torch.stack(expected).tolist()


def test_padding_taken_for_tokens_would_change_the_answer(make_checkpoint, batch):
    model, (tokens, is_token) = make_checkpoint().model, batch
    seen = generate(model, tokens, max_new_tokens=NEW)[:, tokens.shape[1] :]
    expected = torch.stack(alone(model, tokens, is_token))
    assert (seen != expected).any(dim=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_padded_batch_equals_transformers(checkpoint, batch, penalty):
    """It takes the padding out of the penalty too, as it knows the attention mask."""
    tokens, is_token = batch
    sampler = Sample(repetition_penalty=penalty, top_k=1)
    options = {"max_new_tokens": NEW, "is_token": is_token, "sampler": sampler}
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=is_token.long(),
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate(checkpoint.model, tokens, **options)
    assert found.tolist() == expected.tolist()


def test_every_row_has_its_own_stop_ids(make_checkpoint, batch):
    tokens, is_token = batch
    model = make_checkpoint().model
    free = generate(model, tokens, max_new_tokens=NEW, is_token=is_token)
    new = free[:, tokens.shape[1] :].tolist()
    stops = [[new[0][3], new[0][8]], (), {new[2][0]}, [new[3][5]]]
    found = generate(
        model, tokens, max_new_tokens=NEW, is_token=is_token, stop_ids=stops
    )
    for row, ids, answer in zip(found.tolist(), stops, new, strict=True):
        at = next((i for i, token in enumerate(answer) if token in ids), NEW - 1)
        expected = answer[: at + 1] + [answer[at]] * (NEW - 1 - at)
        assert row[tokens.shape[1] :] == expected


def test_it_ends_when_every_row_has_met_its_own(make_checkpoint, batch):
    tokens, is_token = batch
    model = make_checkpoint().model
    free = generate(model, tokens, max_new_tokens=NEW, is_token=is_token)
    stops = [[row[tokens.shape[1] + 2]] for row in free.tolist()]
    found = generate(
        model, tokens, max_new_tokens=NEW, is_token=is_token, stop_ids=stops
    )
    assert found.shape[1] <= tokens.shape[1] + 3


@pytest.mark.parametrize(
    "stops", [[[1], [2]], [[1], [2], [3], [4], [5]], [1, [2], 3, 4]]
)
def test_stop_ids_for_another_number_of_rows(make_checkpoint, batch, stops):
    with pytest.raises(ValueError, match="stop_ids must be ids, or 4 collections"):
        generate(make_checkpoint().model, batch[0], max_new_tokens=1, stop_ids=stops)


@pytest.mark.parametrize("row", [[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
def test_padding_elsewhere_than_on_the_left(make_checkpoint, row):
    is_token = torch.tensor([[1, 1, 1], row], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"row 1: padding must stand on the left"):
        generate(
            make_checkpoint().model,
            torch.ones(2, 3, dtype=torch.long),
            max_new_tokens=1,
            is_token=is_token,
        )


@pytest.mark.usefixtures("unchecked")
def test_an_is_token_of_another_shape(make_checkpoint, batch):
    tokens, is_token = batch
    message = r"is_token must be \(B, T\) = \(4, 9\), got \(4, 8\)"
    with pytest.raises(ValueError, match=message):
        generate(
            make_checkpoint().model, tokens, max_new_tokens=1, is_token=is_token[:, 1:]
        )


def test_a_sampler_is_shown_tokens_and_no_padding(make_checkpoint, batch):
    (tokens, is_token), shown = batch, []

    def sampler(logits, so_far):
        shown.append(so_far)
        return logits.argmax(dim=-1)

    model = make_checkpoint().model
    found = generate(
        model, tokens, max_new_tokens=3, is_token=is_token, sampler=sampler
    )
    assert [t.shape[1] for t in shown] == [9, 10, 11]
    for row, real, so_far in zip(found, is_token, shown[-1], strict=True):
        assert set(so_far.tolist()) == {*row[:9][real].tolist(), *row[9:11].tolist()}


def test_draws_can_be_repeated(make_checkpoint, batch):
    model, (tokens, is_token) = make_checkpoint().model, batch

    def draw(seed):
        sampler = Sample(generator=torch.Generator().manual_seed(seed))
        return generate(
            model, tokens, max_new_tokens=9, is_token=is_token, sampler=sampler
        ).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
