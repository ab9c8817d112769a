"""The filters in order, and the draw."""

import pytest
import torch
from transformers import GenerationConfig

from annotated_src.generate import generate
from annotated_src.sampler import Sample, chatglm_sampler
from annotated_src.sampling import (
    FALLBACK_ID,
    greedy,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

NAN, INF = torch.nan, torch.inf
ALL = {
    "repetition_penalty": 1.3,
    "temperature": 0.7,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.05,
}


def test_a_temperature_that_overflows_is_refused_not_drawn():
    with pytest.raises(ValueError, match="the best score is inf"):
        Sample(temperature=1e-38)(torch.full((1, 4), 1e3))


def test_sample_filters_in_order():
    logits, tokens = 2 * torch.randn(20, 40), torch.randint(40, (20, 15))

    def chain(*steps):
        scores = logits
        for step in steps:
            scores = step(scores)
        return scores.softmax(dim=-1)

    steps = [
        lambda scores: repetition_penalty(scores, tokens, 1.3),
        lambda scores: temperature(scores, 0.7),
        lambda scores: top_k(scores, 9),
        lambda scores: top_p(scores, 0.9),
        lambda scores: min_p(scores, 0.05),
    ]
    expected = chain(*steps)
    found = Sample(**ALL).probabilities(logits, tokens)
    assert torch.equal(found, expected)
    for i, j in ((1, 3), (1, 4), (2, 3), (3, 4)):  # where an exchange changes something
        swapped = list(steps)
        swapped[i], swapped[j] = steps[j], steps[i]
        assert not torch.allclose(chain(*swapped), expected, atol=1e-3), (i, j)


@pytest.mark.parametrize("left_out", [None, *ALL])
def test_the_chain_is_that_of_transformers(left_out, make_checkpoint):
    wanted = {name: value for name, value in ALL.items() if name != left_out}
    logits, tokens = 3 * torch.randn(25, 97), torch.randint(97, (25, 12))
    logits[:5] = logits[:5].round()  # ties
    logits[5:10] = logits[5:10].masked_fill(torch.rand(5, 97) < 0.5, -INF)
    logits[10:12] *= 30
    config = GenerationConfig(do_sample=True, **wanted)
    processors = make_checkpoint().reference._get_logits_processor(config, 12)
    assert len(processors) == len(wanted)
    expected = processors(tokens, logits.clone()).softmax(dim=-1)
    found = Sample(**wanted).probabilities(logits, tokens)
    assert torch.equal(found, expected)


def test_transformers_takes_the_best_50_when_it_is_not_told(make_checkpoint):
    # GenerationMixin.generate fills what nobody has set with these.
    defaults = GenerationConfig._get_default_generation_params()
    assert defaults["top_k"] == 50
    theirs = make_checkpoint().reference
    config, _ = theirs._prepare_generation_config(None, do_sample=True)
    names = [type(p).__name__ for p in theirs._get_logits_processor(config, 1)]
    assert names == ["TopKLogitsWarper"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, ALL, {"repetition_penalty": 2.5, "temperature": 1.5}],
    ids=lambda settings: "-".join(settings) or "none",
)
def test_drawn_texts_are_those_of_transformers(settings, make_checkpoint):
    """The same seed, the same multinomial, the same ids."""
    checkpoint = make_checkpoint()
    prompts = torch.randint(97, (4, 6))
    torch.manual_seed(5)
    found = generate(
        checkpoint.model, prompts, max_new_tokens=30, sampler=Sample(**settings)
    )
    torch.manual_seed(5)
    expected = theirs(checkpoint, prompts, do_sample=True, **({"top_k": 0} | settings))
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) == 4


@pytest.mark.parametrize("penalty", [0.7, 1.2, 5.0])
def test_penalised_greedy_texts_are_those_of_transformers(penalty, make_checkpoint):
    checkpoint = make_checkpoint(tied=True)
    prompts = torch.randint(97, (3, 6))

    def sampler(logits, tokens):
        return greedy(repetition_penalty(logits, tokens, penalty))

    found = generate(checkpoint.model, prompts, max_new_tokens=30, sampler=sampler)
    expected = theirs(checkpoint, prompts, do_sample=False, repetition_penalty=penalty)
    assert torch.equal(found, expected)
    plain = generate(checkpoint.model, prompts, max_new_tokens=30)
    assert not torch.equal(found, plain)


def test_padding_is_not_penalised(make_checkpoint):
    """As in transformers, a row is penalised for its own tokens, not for padding."""
    checkpoint = make_checkpoint()
    tokens = torch.randint(97, (2, 6))
    is_token = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])

    def sampler(logits, tokens):
        return greedy(repetition_penalty(logits, tokens, 3.0))

    found = generate(
        checkpoint.model, tokens, max_new_tokens=20, sampler=sampler, is_token=is_token
    )
    alone = generate(
        checkpoint.model, tokens[:1, 3:], max_new_tokens=20, sampler=sampler
    )
    assert found[0, 6:].tolist() == alone[0, 3:].tolist()
    expected = theirs(
        checkpoint,
        tokens,
        length=20,
        attention_mask=is_token.long(),
        do_sample=False,
        repetition_penalty=3.0,
    )
    assert torch.equal(found[:, 6:], expected[:, 6:])


def theirs(checkpoint, prompts, length=30, attention_mask=None, **settings):
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
    return checkpoint.reference.generate(
        prompts,
        attention_mask=attention_mask,
        max_new_tokens=length,
        min_new_tokens=length,  # no end token
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )


def test_sample_without_filters_is_the_softmax():
    logits = torch.randn(4, 30)
    assert torch.equal(Sample().probabilities(logits), logits.softmax(dim=-1))
    tokens = torch.randint(30, (4, 9))
    assert torch.equal(Sample().probabilities(logits, tokens), logits.softmax(dim=-1))


def test_without_tokens_nothing_is_penalised():
    logits = torch.randn(4, 30)
    sample = Sample(repetition_penalty=3.0)
    assert torch.equal(sample.probabilities(logits), logits.softmax(dim=-1))


def test_bad_values_are_refused_when_a_sampler_is_made():
    for name, value, wanted in (
        ("repetition_penalty", INF, "above 0, got inf"),
        ("temperature", 0.0, "above 0, got 0.0; for 0, use greedy"),
        ("top_k", 0, "at least 1, got 0"),
        ("top_p", 1.5, "above 0 and at most 1, got 1.5"),
        ("min_p", -0.5, "0 to 1, got -0.5"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {wanted}"):
            Sample(**{name: value})


def test_of_many_alike_chatglm_draws_from_the_best_50():
    logits = torch.linspace(0, 0.01, 200)[None]
    kept = (chatglm_sampler().probabilities(logits)[0] > 0).nonzero().flatten()
    assert kept.tolist() == list(range(200 - 35, 200))  # 0.7 of 50, not of 200


def test_chatglm_draws_its_fallback_when_scores_break():
    logits = torch.randn(3, 20)
    logits[2, 0] = NAN
    assert chatglm_sampler()(logits).tolist() == [FALLBACK_ID] * 3


def chi_squared(drawn, expected):
    """The distance of drawn ids from what their probabilities lead to expect."""
    counts = drawn.bincount(minlength=len(expected)).double()
    return ((counts - len(drawn) * expected) ** 2 / (len(drawn) * expected)).sum()


def test_draws_follow_the_probabilities():
    bound = 31  # chi-squared, 5 degrees of freedom: 1 in 100 000
    shares = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    sample = Sample(generator=torch.Generator().manual_seed(0))
    drawn = sample(shares.log().expand(20_000, -1))
    assert chi_squared(drawn, shares) < bound
    moved = shares + torch.tensor([-0.02, 0.02, 0, 0, 0, 0])
    assert chi_squared(drawn, moved) > bound  # the test would see as little as this


def test_draws_through_all_filters_follow_what_is_left():
    """Worked out by hand: each filter takes something from these six."""
    shares = torch.tensor([0.36, 0.24, 0.16, 0.12, 0.08, 0.04])
    # Token 0 has come: its score, a logarithm below 0, is doubled, 0.36 to 0.1296; then
    # t = 0.5 squares all. Of 0.0168 0.0576 0.0256 0.0144 0.0064 0.0016, top-k 5 drops
    # the last, top-p 0.95 the one before it, min-p 0.27 what is below 0.0156.
    kept = torch.tensor([0.1296, 0.24, 0.16]).square().double()
    sample = Sample(
        repetition_penalty=2.0,
        temperature=0.5,
        top_k=5,
        top_p=0.95,
        min_p=0.27,
        generator=torch.Generator().manual_seed(0),
    )
    drawn = sample(
        shares.log().expand(20_000, -1), torch.zeros(20_000, 3, dtype=torch.long)
    )
    assert set(drawn.tolist()) == {0, 1, 2}
    bound = 23  # chi-squared, 2 degrees of freedom: 1 in 100 000
    assert chi_squared(drawn, kept / kept.sum()) < bound
    unpenalised = torch.tensor([0.36, 0.24, 0.16]).square().double()
    assert chi_squared(drawn, unpenalised / unpenalised.sum()) > bound


@pytest.mark.parametrize("excluding", [{"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_excluded_tokens_are_never_drawn(excluding):
    logits = torch.randn(1, 30)
    sample = Sample(**excluding, generator=torch.Generator().manual_seed(0))
    left = (sample.probabilities(logits)[0] > 0).nonzero().flatten().tolist()
    drawn = sample(logits.expand(5000, -1))
    assert 1 < len(left) < 30
    assert set(drawn.tolist()) == set(left)


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


def test_it_is_a_sampler_for_generate(make_checkpoint):
    model, prompt = make_checkpoint().model, torch.tensor([[1, 2, 3], [4, 5, 6]])

    def text(sampler):
        return generate(model, prompt, max_new_tokens=9, sampler=sampler).tolist()

    # One token left to choose from is the greedy choice.
    assert text(Sample(top_k=1)) == text(greedy)
    drawn = [text(chatglm_sampler(torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
