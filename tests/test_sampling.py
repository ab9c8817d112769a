from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation import logits_process

from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.sampling import (
    FALLBACK_ID,
    Sample,
    chatglm_sampler,
    greedy,
    guard_invalid,
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


def awkward_again():
    torch.manual_seed(0)  # as the fixture `seed` left it
    return awkward()


def test_a_row_does_not_depend_on_its_neighbours():
    logits = awkward()
    for single in (lambda x: top_k(x, 5), lambda x: top_p(x, 0.7)):
        alone = torch.cat([single(row[None]) for row in logits])
        assert torch.equal(single(logits), alone)


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


def test_they_compute_in_float32_and_leave_their_input_alone():
    logits = torch.randn(2, 30).half()
    before = logits.clone()
    for found in (
        temperature(logits, 0.7),
        top_k(logits, 3),
        top_p(logits, 0.5),
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


BAD_VALUES = [
    (temperature, "temperature", [0.0, -1.0, NAN], "above 0"),
    (top_k, "top_k", [0, -3], "at least 1"),
    (top_p, "top_p", [0.0, -0.1, 1.0001, 70.0, NAN], "above 0 and at most 1"),
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
        Sample(),
    ],
)
def test_scores_without_a_finite_best_are_refused(function, row, score):
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(ValueError, match=f"row 1: the best score is {score}, not"):
        function(logits)


def test_a_temperature_that_overflows_is_refused_not_drawn():
    with pytest.raises(ValueError, match="the best score is inf"):
        Sample(temperature=1e-38)(torch.full((1, 4), 1e3))


def test_sample_filters_in_order():
    logits = awkward()[12:]
    expected = top_p(top_k(temperature(logits, 0.6), 8), 0.8).softmax(dim=-1)
    sample = Sample(temperature=0.6, top_k=8, top_p=0.8)
    assert torch.equal(sample.probabilities(logits), expected)
    other = temperature(top_k(top_p(logits, 0.8), 8), 0.6).softmax(dim=-1)
    assert not torch.allclose(other, expected, atol=1e-2)


def test_sample_without_filters_is_the_softmax():
    logits = torch.randn(4, 30)
    assert torch.equal(Sample().probabilities(logits), logits.softmax(dim=-1))


def test_of_many_alike_chatglm_draws_from_the_best_50():
    logits = torch.linspace(0, 0.01, 200)[None]
    kept = (chatglm_sampler().probabilities(logits)[0] > 0).nonzero().flatten()
    assert kept.tolist() == list(range(200 - 35, 200))  # 0.7 of 50, not of 200


def test_chatglm_draws_its_fallback_when_scores_break():
    logits = torch.randn(3, 20)
    logits[2, 0] = NAN
    assert chatglm_sampler()(logits).tolist() == [FALLBACK_ID] * 3


def test_draws_follow_the_probabilities():
    draws, bound = 20_000, 31  # chi-squared, 5 degrees of freedom: 1 in 100 000
    shares = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    sample = Sample(generator=torch.Generator().manual_seed(0))
    drawn = sample(shares.log().expand(draws, -1))

    def distance(expected):
        counts = drawn.bincount(minlength=6)
        return ((counts - draws * expected) ** 2 / (draws * expected)).sum().item()

    assert distance(shares) < bound
    moved = shares + torch.tensor([-0.02, 0.02, 0, 0, 0, 0])
    assert distance(moved) > bound  # the test would see as little as this


def test_excluded_tokens_are_never_drawn():
    logits = torch.randn(1, 30)
    sample = Sample(top_k=4, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(5000, -1))
    assert set(drawn.tolist()) == set(logits[0].topk(4).indices.tolist())


def test_each_row_is_drawn_from_its_own_scores():
    sure = torch.eye(7)[[3, 0, 6, 3]] * 1e3
    assert Sample()(sure).tolist() == [3, 0, 6, 3]


def test_a_generator_makes_draws_repeatable_whatever_else_draws():
    logits = torch.randn(50, 30)
    first = chatglm_sampler(torch.Generator().manual_seed(7))(logits)
    torch.rand(3)
    again = chatglm_sampler(torch.Generator().manual_seed(7))(logits)
    other = chatglm_sampler(torch.Generator().manual_seed(8))(logits)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_is_a_sampler_for_generate():
    sizes = {"num_layers": 1, "embed_dim": 8, "num_heads": 2, "num_kv_heads": 1}
    sizes |= {"head_dim": 4, "ffn_dim": 8, "max_seq_len": 16, "vocab_size": 30}
    config = LlamaConfig(**sizes, norm_eps=1e-5, rope_base=1e4, tied_head=False)
    model, prompt = Llama(config), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def text(sampler):
        return generate(model, prompt, max_new_tokens=9, sampler=sampler).tolist()

    # One token left to choose from is the greedy choice.
    assert text(Sample(top_k=1)) == text(greedy)
    drawn = [text(chatglm_sampler(torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
