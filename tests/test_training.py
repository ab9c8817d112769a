"""The parts of the training loop, and one step of it beside transformers'."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from annotated_src import training
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.loss import next_token_loss
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.training import (
    adamw,
    batches,
    init_weights,
    learning_rate,
    train,
    train_step,
)

SIZES = LlamaConfig(32, 2, 24, 4, 2, 6, 40, 64, 1e-5, 1e4, True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**changes):
    model = Llama(replace(SIZES, **changes))
    init_weights(model, seeded())
    return model


def test_first_weights_have_the_spread_asked_for():
    config = LlamaConfig(500, 8, 120, 6, 3, 20, 200, 64, 1e-5, 1e4, False, True, True)
    model = Llama(config)
    init_weights(model, seeded())
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            into_stream = "out_proj" in name or "down_proj" in name
            expected = 0.02 / 4 if into_stream else 0.02  # sqrt(2 * 8) is 4
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(weight.mean()) < expected / 10, name


def test_first_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = small().state_dict()
    torch.manual_seed(2)
    again = small().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_at_first_every_token_is_about_as_likely():
    ids = torch.randint(32, (4, 20), generator=seeded(5))
    shares = small()(ids).softmax(-1)
    assert shares.max() < 2 / 32
    assert shares.min() > 0.5 / 32


def test_a_batch_is_windows_of_the_text():
    ids = torch.arange(100)
    tokens = next(batches(ids, 5, 7, seeded()))
    assert tokens.shape == (5, 7)
    assert torch.equal(tokens - tokens[:, :1], torch.arange(7).expand(5, 7))
    assert len(set(tokens[:, 0].tolist())) > 1


def test_every_place_in_the_text_is_drawn_the_first_and_the_last_too():
    stream = batches(torch.arange(9), 4, 6, seeded())
    starts = {int(row[0]) for _ in range(20) for row in next(stream)}
    assert starts == {0, 1, 2, 3}
    whole = next(batches(torch.arange(6), 3, 6, seeded()))
    assert torch.equal(whole, torch.arange(6).expand(3, 6))


def test_batches_repeat_with_their_seed():
    def first(seed):
        stream = batches(torch.arange(1000), 4, 6, seeded(seed))
        return torch.stack([next(stream) for _ in range(3)])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert not torch.equal(*first(1)[:2])


@pytest.mark.parametrize(
    ("batch_size", "window", "message"),
    [
        (0, 5, "batch_size must be 1 or more, got 0"),
        (2, 1, "window must be 2 to 20 tokens, the whole text; got 1"),
        (2, 21, "window must be 2 to 20 tokens, the whole text; got 21"),
    ],
)
def test_wrong_sizes_are_refused_at_once(batch_size, window, message):
    with pytest.raises(ValueError, match=message):
        batches(torch.arange(20), batch_size, window, seeded())


def test_a_window_is_its_own_labels():
    """The score at t is measured against token t + 1, T - 1 times a row."""
    model, tokens = small(), torch.randint(32, (3, 6), generator=seeded())
    shares = model(tokens).log_softmax(-1).tolist()
    surprises = [
        -shares[row][t][int(tokens[row, t + 1])] for row in range(3) for t in range(5)
    ]
    found = train_step(model, adamw(model, 0.1), tokens)
    assert found == pytest.approx(sum(surprises) / 15, rel=1e-5)


def test_the_rate_rises_in_equal_steps_and_falls_to_a_tenth():
    rates = [learning_rate(i, steps=105, peak=2.0, warmup=4) for i in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.1)  # half way: the middle of 2 and 0.2
    assert rates[29] == pytest.approx(0.2 + 0.9 * (1 + math.sqrt(0.5)))
    assert rates[104] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_the_rate_without_warm_up_or_with_nothing_else():
    assert learning_rate(0, steps=1, peak=1.0, warmup=0) == 1.0
    flat = [learning_rate(i, steps=3, peak=1.0, warmup=0, floor=1.0) for i in range(3)]
    assert flat == [1.0, 1.0, 1.0]
    rising = [learning_rate(i, steps=2, peak=1.0, warmup=2) for i in range(2)]
    assert rising == [0.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step must be 0 to 9, got -1"),
        ({"step": 10}, "step must be 0 to 9, got 10"),
        ({"warmup": 11}, "got 11 and 1.0"),
        ({"warmup": -1}, "got -1 and 1.0"),
        ({"peak": 0.0}, "got 2 and 0.0"),
    ],
)
def test_a_rate_that_makes_no_sense_is_refused(changes, message):
    given = {"step": 0, "steps": 10, "peak": 1.0, "warmup": 2} | changes
    with pytest.raises(ValueError, match=message):
        learning_rate(**given)


def test_matrices_shrink_and_gains_and_biases_do_not():
    model = small(tied_head=False, attention_bias=True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)  # so that nothing but decay acts
    optimizer = adamw(model, 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, weight in model.named_parameters():
        kept = 1 if "norm" in name or "bias" in name else 1 - 0.1 * 0.5
        assert torch.allclose(weight, before[name] * kept), name


def test_every_weight_has_a_place_in_the_optimizer_once():
    model = small(tied_head=True, mlp_bias=True)
    groups = adamw(model, 0.1).param_groups
    placed = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(placed) == sorted(id(weight) for weight in model.parameters())


def test_the_loss_falls_towards_what_the_task_leaves_open():
    """Each token is the one before plus 1, 2, 3 or 4: ln 4 is the best there is."""
    ids = torch.randint(1, 5, (4000,), generator=seeded()).cumsum(0) % 32
    model = small()
    losses = list(
        train(model, batches(ids, 16, 24, seeded()), steps=120, peak=1e-2, warmup=10)
    )
    assert len(losses) == 120
    assert losses[0] == pytest.approx(math.log(32), abs=0.15)
    assert math.log(4) - 0.05 < sum(losses[-10:]) / 10 < math.log(4) + 0.3


def test_each_step_takes_the_rate_of_the_schedule(monkeypatch):
    rates = []

    def watched(model, optimizer, tokens):
        rates.append({group["lr"] for group in optimizer.param_groups})
        return 0.0

    monkeypatch.setattr(training, "train_step", watched)
    stream = batches(torch.arange(30), 2, 4, seeded())
    assert list(train(small(), stream, steps=6, peak=0.3, warmup=2)) == [0.0] * 6
    expected = [learning_rate(i, steps=6, peak=0.3, warmup=2) for i in range(6)]
    assert rates == [{rate} for rate in expected]


def test_a_schedule_that_makes_no_sense_stops_before_the_first_step():
    model, before = small(), small().state_dict()
    with pytest.raises(ValueError, match="warmup must be 0 to 5"):
        list(train(model, [], steps=5, peak=1.0, warmup=6))
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())


def test_it_trains_where_gradients_are_switched_off():
    model, tokens = small(), torch.randint(32, (2, 8), generator=seeded())
    with torch.no_grad():
        losses = list(train(model, [tokens] * 20, steps=20, peak=1e-2, warmup=2))
    assert losses[-1] < losses[0] - 1


def gradients(model, tokens):
    model.zero_grad()
    next_token_loss(model(tokens), tokens).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_long_gradients_are_shortened_and_short_ones_are_not():
    model, tokens = small(), torch.randint(32, (2, 8), generator=seeded())
    full = gradients(model, tokens)
    norm = math.sqrt(sum(float(g.square().sum()) for g in full.values()))
    full = {name: gradient.clone() for name, gradient in full.items()}
    for limit in (norm / 10, norm * 10):
        train_step(model, adamw(model, 0.1), tokens, limit)  # the rate is still 0
        for name, weight in model.named_parameters():
            expected = full[name] * min(1, limit / norm)
            torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_loss_gradients_and_one_step_are_those_of_transformers(checkpoint):
    """Their own loss, from labels=, and torch's AdamW set up by hand."""
    ours = load_model(checkpoint.path)
    theirs = LlamaForCausalLM.from_pretrained(
        checkpoint.path, attn_implementation="eager"
    )
    tokens = torch.randint(97, (3, 20), generator=seeded())
    optimizer = adamw(ours, 0.1)
    matrices = [w for w in theirs.parameters() if w.ndim == 2]
    vectors = [w for w in theirs.parameters() if w.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    for group in (*optimizer.param_groups, *reference.param_groups):
        # Not 1e-8: Adam would make a whole step of a gradient that is rounding alone.
        group["lr"], group["eps"] = 1e-3, 1e-4
    for _ in range(2):  # the second step meets the memory of the first
        expected = theirs(input_ids=tokens, labels=tokens).loss
        reference.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        found = train_step(ours, optimizer, tokens)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        compare(ours, theirs)


def compare(ours, theirs):
    named = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    names = names_by_layer(ours, HF_NAMES)
    assert set(names.values()) == set(mine)
    for their_name, our_name in names.items():
        weight, expected = mine[our_name], named[their_name]
        # After clipping all gradients together have length 1 at most.
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)  # of 1e-3
