"""An attempt may loop, raise, print, change its inputs: the runner tells."""

import random
import time

import numpy as np
import pytest
import torch

from annotated_src.checks.draw import Draw
from annotated_src.checks.running import run


def test_a_result_comes_back_and_the_inputs_stay():
    x = torch.ones(3)
    outcome = run(lambda x: x + 1, (x,))
    assert outcome.kind == "returned"
    assert outcome.value.tolist() == [2, 2, 2]
    assert outcome.changed == ()
    assert outcome.steady


def test_a_change_in_place_is_noticed_and_does_not_reach_the_caller():
    x, kept = torch.ones(3), [1]

    def attempt(x, kept):
        x.mul_(2)
        kept.append(2)

    assert run(attempt, (x, kept)).changed == (0, 1)
    assert x.tolist() == [1, 1, 1]
    assert kept == [1]


def endless(x):
    while True:
        x += 1


def stubborn(x):
    while True:
        try:
            while True:
                x += 1
        except Exception:
            pass


def deaf(x):
    for _ in range(3):
        try:
            while True:
                x += 1
        except:  # noqa: E722 - the point
            pass
    return x


@pytest.mark.parametrize("attempt", [endless, stubborn])
def test_endless_loops_are_stopped(attempt):
    start = time.monotonic()
    assert run(attempt, (1,), seconds=0.2).kind == "timed out"
    assert time.monotonic() - start < 5


def test_even_one_that_catches_everything_is_stopped_again_and_again():
    start = time.monotonic()
    assert run(deaf, (1,), seconds=0.1, twice=False).kind == "timed out"
    assert time.monotonic() - start < 5


def test_a_call_that_hangs_in_a_library_is_not_waited_for():
    start = time.monotonic()
    assert run(lambda: time.sleep(8), (), seconds=0.1).kind == "timed out"
    assert time.monotonic() - start < 5


def test_nothing_is_thrown_after_the_call():
    # calls that end about when their time does
    for _ in range(200):
        outcome = run(lambda: sum(range(20_000)), (), seconds=0.0005, twice=False)
        assert (outcome.kind, outcome.value) in (
            ("returned", 199_990_000),
            ("timed out", None),
        )


def test_a_slow_machine_is_no_reason():
    assert run(lambda: time.sleep(0.05), (), seconds=2.0).kind == "returned"


@pytest.mark.parametrize("problem", [ValueError("no"), SystemExit(3), RecursionError()])
def test_what_is_raised_is_told(problem):
    def attempt():
        raise problem

    outcome = run(attempt, ())
    assert outcome.kind == "raised"
    assert outcome.error.startswith(type(problem).__name__)
    assert "raise problem" in outcome.line


def test_an_interrupt_of_the_user_is_not_swallowed():
    def attempt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(attempt, ())


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: torch.randn(3),
        lambda: random.random(),
        lambda: np.random.rand(),  # noqa: NPY002 - the point
        lambda calls=[]: calls.append(1) or len(calls),
    ],
)
def test_randomness_and_memory_are_noticed(attempt):
    assert not run(attempt, ()).steady


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: (x for x in "ab"),
        lambda: map(str, [1]),
        lambda: lambda: 1,
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.ones(2, device="meta"),
        lambda: np.array(["a", {}]),
        lambda: np.arange(3)[::-1],
    ],
)
def test_what_cannot_be_compared_is_not_called_random(attempt):
    outcome = run(attempt, ())
    assert outcome.kind == "returned"
    assert outcome.steady


def test_a_list_inside_itself_is_no_end_of_the_check():
    def attempt():
        inside = []
        inside.append(inside)
        return inside

    assert run(attempt, ()).kind == "returned"


def test_the_seeds_of_the_caller_stay(unchecked):  # the check of types draws, too
    torch.manual_seed(3)
    random.seed(3)
    wanted = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    run(lambda: torch.rand(5).sum() + random.random(), ())
    assert torch.equal(torch.rand(2), wanted[0])
    assert random.random() == wanted[1]


def test_the_default_dtype_of_the_caller_does_not_matter_and_stays():
    torch.set_default_dtype(torch.float64)
    try:
        assert run(lambda: torch.ones(1), ()).value.dtype == torch.float32
        assert Draw(0).normal(2).dtype == Draw(0).uniform(2).dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_prints_are_caught(capsys):
    outcome = run(lambda: print("here"), ())
    assert outcome.printed == "here\n"
    assert capsys.readouterr().out == ""
