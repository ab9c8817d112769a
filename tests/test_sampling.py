"""Each filter of the scores against its counterpart in the originals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation import logits_process

from annotated_src.sampler import Sample, chatglm_sampler
from annotated_src.sampling import (
    greedy,
    guard_invalid,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

GOLDEN = Path(__file__).parent / "golden" / "chatglm6b"
INF, NAN = torch.inf, torch.nan


@pytest.fixture(scope="module")
def golden():
    """The original's processors; it has -1e30 where they give -inf."""
    tensors = load_file(GOLDEN / "generation.safetensors")
    return {
        name.split("/")[1]: tensor.masked_fill(tensor == -1e30, -INF)
        for name, tensor in tensors.items()
        if name.startswith("processors/")
    }


def awkward():
    """Rows with ties everywhere, with a far tail, with one that wins, with -inf."""
    ties = torch.randint(-2, 3, (6, 40)).float()
    equal = torch.full((1, 40), 1.5)
    wide = 30 * torch.randn(3, 40)
    sure = torch.randn(1, 40).index_fill(1, torch.tensor([17]), 1e4)
    extreme = torch.randn(1, 40).mul(3e37)
    some_excluded = torch.randn(3, 40).masked_fill(torch.rand(3, 40) < 0.5, -INF)
    one_left = torch.full((1, 40), -INF).index_fill(1, torch.tensor([9]), -2.0)
    rows = [ties, equal, wide, sure, extreme, some_excluded, one_left]
    return torch.cat([*rows, torch.randn(20, 40)])


def test_greedy_takes_the_best_of_each_row():
    logits = torch.tensor([[-3.0, -1.0, -2.0], [4.0, 4.5, 5.0]])
    assert greedy(logits).tolist() == [1, 2]


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[1.0, 7.0, 7.0, 7.0]])).tolist() == [1]


def test_greedy_does_not_pass_over_infinity():
    logits = torch.tensor([[-torch.inf, -1e30, -torch.inf]])
    assert greedy(logits).tolist() == [1]


def test_the_chain_of_chatglm_is_the_original_s(golden):
    found = temperature(golden["scores"], 0.95)
    torch.testing.assert_close(found, golden["temperature"], rtol=0, atol=1e-6)
    found = top_k(found, 50)
    assert (found > -INF).sum(dim=1).tolist() == [50, 50, 50]
    torch.testing.assert_close(found, golden["top_k"], rtol=0, atol=1e-6)
    found = top_p(found, 0.7)
    assert (found > -INF).sum(dim=1).tolist() == [3, 6, 3]
    torch.testing.assert_close(found, golden["top_p"], rtol=0, atol=1e-6)
    found = chatglm_sampler().probabilities(golden["scores"])
    torch.testing.assert_close(found, golden["probs"], rtol=0, atol=1e-6)


def test_the_guard_is_the_original_s(golden):
    assert torch.equal(guard_invalid(golden["scores_nan"]), golden["invalid_score"])
    assert torch.equal(guard_invalid(golden["scores"]), golden["scores"])


@pytest.mark.parametrize("t", [1e-3, 0.5, 0.95, 1.0, 2.0, 1e3])
def test_temperature_is_that_of_transformers(t):
    warper = logits_process.TemperatureLogitsWarper(t)
    logits = awkward().clamp(-1e30, 1e30)
    assert torch.equal(temperature(logits, t), warper(None, logits))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 39, 40, 41, 1000])
def test_top_k_is_that_of_transformers(k):
    warper = logits_process.TopKLogitsWarper(k)
    assert torch.equal(top_k(awkward(), k), warper(None, awkward_again()))


@pytest.mark.parametrize("p", [1e-20, 1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_top_p_is_that_of_transformers(p):
    warper = logits_process.TopPLogitsWarper(p)
    assert torch.equal(top_p(awkward(), p), warper(None, awkward_again()))


@pytest.mark.parametrize("p", [0.0, 1e-30, 1e-6, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_min_p_is_that_of_transformers(p):
    warper = logits_process.MinPLogitsWarper(p)
    assert torch.equal(min_p(awkward(), p), warper(None, awkward_again()))


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 0.999, 1.0, 1.1, 1.3, 2.0, 1e3])
@pytest.mark.parametrize("length", [1, 5, 200])
def test_repetition_penalty_is_that_of_transformers(penalty, length):
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    logits = awkward().clamp(-1e30, 1e30)
    tokens = torch.randint(40, (logits.shape[0], length))
    found = repetition_penalty(logits, tokens, penalty)
    assert torch.equal(found, processor(tokens, logits.clone()))
    changed = (found != logits).any()
    assert changed == (penalty != 1.0)


def test_repetition_penalty_of_one_row_is_that_of_transformers():
    logits, tokens = torch.randn(1, 9), torch.tensor([[8, 0, 8, 3]])
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    found = repetition_penalty(logits, tokens, 1.7)
    assert torch.equal(found, processor(tokens, logits.clone()))


def awkward_again():
    torch.manual_seed(0)  # as the fixture `seed` left it
    return awkward()


def test_a_row_does_not_depend_on_its_neighbours():
    logits = awkward()
    for single in (
        lambda x: top_k(x, 5),
        lambda x: top_p(x, 0.7),
        lambda x: min_p(x, 0.1),
    ):
        alone = torch.cat([single(row[None]) for row in logits])
        assert torch.equal(single(logits), alone)


def test_a_row_is_penalised_for_its_own_tokens_only():
    logits = torch.tensor([[1.0, 2.0, -4.0]]).expand(2, -1)
    found = repetition_penalty(logits, torch.tensor([[0, 2], [1, 1]]), 2.0)
    assert found.tolist() == [[0.5, 2.0, -8.0], [1.0, 1.0, -4.0]]


def test_a_penalty_below_one_favours_what_has_come():
    found = repetition_penalty(torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]]), 0.5)
    assert found.tolist() == [[2.0, -0.5]]


def test_a_score_of_zero_or_an_excluded_one_cannot_be_penalised():
    logits = torch.tensor([[0.0, -INF, 3.0]])
    found = repetition_penalty(logits, torch.tensor([[0, 1]]), 5.0)
    assert found.tolist() == logits.tolist()


def test_without_tokens_there_is_nothing_to_penalise():
    logits = torch.randn(2, 9)
    none = torch.zeros(2, 0, dtype=torch.long)
    assert torch.equal(repetition_penalty(logits, none, 3.0), logits)


@pytest.mark.parametrize("bad", [-1, 9, 100])
def test_the_penalty_refuses_ids_outside_the_vocabulary(bad):
    tokens = torch.tensor([[3, bad]])
    low, high = sorted([3, bad])
    message = f"tokens must be 0 to 8, got ids from {low} to {high}"
    with pytest.raises(ValueError, match=message):
        repetition_penalty(torch.randn(1, 9), tokens, 1.5)


def test_temperature_keeps_ratios_of_logarithms():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    assert temperature(logits, 0.5).tolist() == [[0.0, 2.0, 6.0]]


def test_top_k_keeps_whatever_equals_the_kth_best():
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 3.0]])
    assert top_k(logits, 1).tolist() == [[5.0, -INF, -INF, -INF, -INF]]
    assert top_k(logits, 2).tolist() == [[5.0, 4.0, 4.0, 4.0, -INF]]
    assert top_k(logits, 9).tolist() == logits.tolist()


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.05, [2]), (0.49, [2]), (0.6, [0, 2]), (0.9, [0, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_that_share_p(p, kept):
    logits = torch.tensor([[0.25, 0.0625, 0.5, 0.1875]]).log()
    found = top_p(logits, p)
    assert (found[0] > -INF).nonzero().flatten().tolist() == kept
    assert torch.equal(found[0, kept], logits[0, kept])


def test_top_p_of_equals_keeps_as_many_as_it_needs():
    for p, kept in ((0.01, 1), (0.3, 3), (0.7, 6), (1.0, 8)):
        assert (top_p(torch.zeros(1, 8), p) > -INF).sum() == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.124, [0, 1, 2, 3]),
        (0.2, [0, 2, 3]),
        (0.49, [0, 2]),
        (0.6, [2]),
        (1.0, [2]),
    ],
)
def test_min_p_keeps_what_reaches_a_share_of_the_best(p, kept):
    logits = torch.tensor([[0.25, 0.0625, 0.5, 0.1875]]).log()
    found = min_p(logits, p)
    assert (found[0] > -INF).nonzero().flatten().tolist() == kept
    assert torch.equal(found[0, kept], logits[0, kept])


def test_min_p_of_equals_keeps_all():
    assert torch.equal(min_p(torch.zeros(1, 8), 1.0), torch.zeros(1, 8))


def test_min_p_keeps_few_where_one_wins_and_many_where_none_does():
    logits = torch.tensor([[5.0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0]])
    assert (min_p(logits, 0.1) > -INF).sum(dim=1).tolist() == [1, 5]


def test_they_compute_in_float32_and_leave_their_input_alone():
    logits = torch.randn(2, 30).half()
    before = logits.clone()
    for found in (
        temperature(logits, 0.7),
        top_k(logits, 3),
        top_p(logits, 0.5),
        min_p(logits, 0.5),
        repetition_penalty(logits, torch.tensor([[3], [4]]), 1.5),
        guard_invalid(logits),
        guard_invalid(logits.masked_fill(logits > 1, NAN)),
    ):
        assert found.dtype == torch.float32
    assert torch.equal(temperature(logits, 0.7), before.float() / 0.7)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_guard_replaces_all_rows_for_one_bad_score(bad):
    logits = torch.randn(3, 9)
    logits[1, 4] = bad
    before = logits.clone()
    found = guard_invalid(logits, fallback_id=2)
    assert found.tolist() == [[0, 0, 5e4, 0, 0, 0, 0, 0, 0]] * 3
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("fallback_id", [-1, 9, 100])
def test_the_guard_refuses_an_id_outside_the_vocabulary(fallback_id):
    with pytest.raises(ValueError, match=rf"id {fallback_id} is outside 0 to 8"):
        guard_invalid(torch.randn(3, 9), fallback_id)
    with pytest.raises(ValueError, match="id 5 is outside 0 to 4"):
        guard_invalid(torch.randn(3, 5))


def penalise(logits, penalty):
    return repetition_penalty(logits, torch.tensor([[0, 1]] * len(logits)), penalty)


BAD_VALUES = [
    (penalise, "repetition_penalty", [0.0, -1.2, INF, -INF, NAN], "above 0"),
    (temperature, "temperature", [0.0, -1.0, -INF, NAN], "above 0"),
    (top_k, "top_k", [0, -3], "at least 1"),
    (top_p, "top_p", [0.0, -0.1, 1.0001, 70.0, INF, NAN], "above 0 and at most 1"),
    (min_p, "min_p", [-0.1, 1.0001, 70.0, INF, NAN], "0 to 1"),
]


@pytest.mark.parametrize(
    ("function", "name", "value", "wanted"),
    [(f, n, v, wanted) for f, n, values, wanted in BAD_VALUES for v in values],
)
def test_bad_values_are_refused_at_once(function, name, value, wanted):
    message = rf"{name} must be {wanted}, got {value}"
    with pytest.raises(ValueError, match=message):
        function(torch.randn(2, 9), value)
    with pytest.raises(ValueError, match=message):
        Sample(**{name: value})


@pytest.mark.parametrize(
    ("row", "score"),
    [([1.0, NAN, 0.0], "nan"), ([1.0, INF, 0.0], "inf"), ([-INF] * 3, "-inf")],
)
@pytest.mark.parametrize(
    "function",
    [
        lambda logits: temperature(logits, 0.5),
        lambda logits: top_k(logits, 2),
        lambda logits: top_p(logits, 0.5),
        lambda logits: min_p(logits, 0.5),
        lambda logits: penalise(logits, 1.5),
        Sample(),
    ],
)
def test_scores_without_a_finite_best_are_refused(function, row, score):
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(ValueError, match=f"row 1: the best score is {score}, not"):
        function(logits)


@pytest.mark.parametrize("broken", [NAN, INF])
def test_greedy_refuses_broken_scores(broken):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, broken, 9.0]])
    with pytest.raises(ValueError, match=rf"row 1: the best score is {broken}"):
        greedy(logits)


def test_an_endless_temperature():
    with pytest.raises(ValueError, match="temperature must be above 0, got inf"):
        temperature(torch.zeros(1, 3), INF)
