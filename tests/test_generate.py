import importlib.util
from types import SimpleNamespace

import pytest
import torch

from annotated_src import generate as module
from annotated_src.beam_search import beam_search
from annotated_src.generate import generate, generate_stream


class Counting:
    """A model that says: after n comes n + 1, and after 9 comes 0."""

    config = SimpleNamespace(max_seq_len=12)

    def __init__(self):
        self.calls = []

    def new_cache(self, batch_size, max_seq_len):
        return [SimpleNamespace(size=(batch_size, max_seq_len), length=0)]

    def __call__(self, tokens, cache, last_logits_only):
        assert last_logits_only
        self.calls.append(tokens.tolist())
        return torch.nn.functional.one_hot((tokens[:, -1:] + 1) % 10, 10).float()


def count_on(prompt, steps, **options):
    tokens = torch.tensor(prompt)
    return generate(Counting(), tokens, max_new_tokens=steps, **options).tolist()


def test_greedy_ids_equal_transformers(checkpoint):
    tokens = torch.randint(0, 97, (3, 7))
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate(checkpoint.model, tokens, max_new_tokens=30)
    assert found.tolist() == expected.tolist()


def test_stopped_rows_equal_transformers(checkpoint):
    """transformers pads a row that has ended; told to, with the stop id."""
    tokens = torch.randint(0, 97, (3, 7))
    free = generate(checkpoint.model, tokens, max_new_tokens=20)
    stop = int(free[1, 12])  # the second row draws it, at the sixth step or before
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    found = generate(checkpoint.model, tokens, max_new_tokens=20, stop_ids=[stop])
    assert found.tolist() == expected.tolist()


def test_without_a_cache_it_is_the_same(make_checkpoint):
    model, tokens = make_checkpoint().model, torch.randint(0, 97, (2, 5))
    expected = tokens
    for _ in range(20):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, tokens, max_new_tokens=20), expected)


def test_the_prompt_is_read_once_and_then_one_token_at_a_time():
    model = Counting()
    generate(model, torch.tensor([[4, 5], [6, 6]]), max_new_tokens=3)
    assert model.calls == [[[4, 5], [6, 6]], [[6], [7]], [[7], [8]]]


def test_a_stopped_row_repeats_its_stop_id_and_the_others_go_on():
    found = count_on([[0], [4], [6]], 8, stop_ids=[2, 7])
    assert found == [[0, 1, 2, 2], [4, 5, 6, 7], [6, 7, 7, 7]]


def test_it_ends_with_the_last_row():
    assert count_on([[0], [1]], 8, stop_ids={2}) == [[0, 1, 2], [1, 2, 2]]
    assert count_on([[0]], 3, stop_ids={9}) == [[0, 1, 2, 3]]


def test_a_stop_id_in_the_prompt_stops_nothing():
    assert count_on([[2]], 3, stop_ids=[2]) == [[2, 3, 4, 5]]


def test_nothing_asked_nothing_added():
    assert count_on([[3, 4]], 0) == [[3, 4]]


def test_another_sampler():
    found = count_on([[3]], 2, sampler=lambda logits, _: logits.argmin(dim=-1))
    assert found == [[3, 0, 0]]


def test_streaming_gives_the_same_columns_one_at_a_time():
    model, prompt = Counting(), torch.tensor([[0], [5]])
    stream = generate_stream(model, prompt, max_new_tokens=4, stop_ids=[7])
    assert next(stream).tolist() == [1, 6]
    assert len(model.calls) == 1  # the second column is not computed yet
    columns = [[1, 6], *(column.tolist() for column in stream)]
    whole = count_on([[0], [5]], 4, stop_ids=[7])
    assert [list(row) for row in zip(*columns, strict=True)] == [r[1:] for r in whole]


def test_no_gradients_are_kept_and_the_callers_mode_is_left_alone(make_checkpoint):
    # inference_mode does not see a generator through the check of signatures, so the
    # file is read once more, past the hook that adds the check.
    spec = importlib.util.spec_from_file_location("plain", module.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    model, tokens, seen = make_checkpoint().model, torch.tensor([[1, 2]]), []

    def sampler(logits, tokens):
        seen.append(logits.requires_grad)
        return logits.argmax(dim=-1)

    for _ in plain.generate_stream(model, tokens, max_new_tokens=2, sampler=sampler):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert seen == [False, False]


@pytest.mark.parametrize("function", [generate, generate_stream])
@pytest.mark.parametrize(
    ("length", "steps", "message"),
    [
        (0, 3, "the prompt has no tokens"),
        (3, -1, r"prompt 3 \+ max_new_tokens -1 must be 0 to 12"),
        (3, 10, r"prompt 3 \+ max_new_tokens 10 must be 0 to 12 tokens"),
        (13, 0, r"prompt 13 \+ max_new_tokens 0 must be 0 to 12 tokens"),
    ],
)
def test_bad_lengths_are_refused_before_the_first_step(
    function, length, steps, message
):
    tokens = torch.zeros(1, length, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        function(Counting(), tokens, max_new_tokens=steps)


def test_all_the_room_may_be_used(make_checkpoint):
    tokens = torch.randint(0, 97, (1, 60))
    found = generate(make_checkpoint().model, tokens, max_new_tokens=4)
    assert found.shape == (1, 64)


def test_an_id_outside_the_vocabulary(make_checkpoint):
    with pytest.raises(
        ValueError, match="token ids must be 0 to 96, got ids from 3 to 97"
    ):
        generate(make_checkpoint().model, torch.tensor([[3, 97]]), max_new_tokens=1)


@pytest.mark.usefixtures("unchecked")
def test_a_prompt_must_be_rows(make_checkpoint):
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(2,\)"):
        generate(make_checkpoint().model, torch.tensor([3, 4]), max_new_tokens=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_equal_transformers(make_checkpoint, num_beams, seed):
    """Without a length penalty; with one, transformers 5 leaves the prompt out."""
    checkpoint = make_checkpoint()
    torch.manual_seed(seed)
    tokens = torch.randint(0, 97, (1, 5))
    stops = torch.randperm(97)[:12].tolist()  # so that beams end early and late
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=8,
        eos_token_id=stops,
        pad_token_id=0,
        length_penalty=0.0,
    )
    found = beam_search(
        checkpoint.model,
        tokens,
        num_beams=num_beams,
        max_new_tokens=8,
        stop_ids=stops,
        length_penalty=0.0,
    )
    assert found.tolist() == expected.tolist()
