"""From what an attempt did to an answer: what is wrong, where, and why people do it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from annotated_src.checks.answers import Answer, Link, Part
from annotated_src.checks.comparing import Difference, difference
from annotated_src.checks.describing import describe
from annotated_src.checks.exercise import Mistake, Question, Task
from annotated_src.checks.running import SECONDS, Outcome, run
from annotated_src.checks.wording import failure


def check_choice(question: Question, letter: str) -> Answer:
    """Answer a letter; wrong ones have answers of their own.

    Raises:
        ValueError: there is no such choice.
    """
    picked = letter.strip().lower().rstrip(").")
    if picked in ("", "?"):
        letters = ", ".join(question.choices)
        still = Part(f"**It is still to be answered:** by one of {letters}.")
        return Answer(question.name, "unfinished", (still,))
    if picked not in question.choices:
        choices = ", ".join(question.choices)
        raise ValueError(f"{question.name} has the choices {choices}, got {letter!r}")
    said = Part(question.choices[picked].answer)
    if picked == question.right:
        why = (Part(question.why),) if question.why else ()
        return Answer(question.name, "right", (said, *why))
    read = Part("Read again:", link=Link(question.chapter, question.section))
    return Answer(question.name, "choice", (said, read))


def check_function(
    task: Task, function: Callable[..., Any], seed: int = 0, seconds: float = SECONDS
) -> Answer:
    """Run an attempt on the inputs of a task, and say what came of it."""
    if problem := signature_problem(task, function):
        return Answer(task.name, "signature", (Part(problem),))
    cases = task.inputs(seed)
    outcomes: list[Outcome] = []
    for case in cases:
        outcomes.append(run(function, case, seconds))
        if outcomes[-1].kind == "timed out":
            break
    return judge(task, cases, outcomes, seed)


def signature_problem(task: Task, function: Callable[..., Any]) -> str:
    """Say why a function cannot be called as the task asks, or nothing."""
    wanted = inspect.signature(task.solution)
    try:
        theirs = inspect.signature(function)
        theirs.bind(*(p for p in wanted.parameters))
    except TypeError as problem:
        return (
            f"It is called as `{task.name}{plain(wanted)}`, but yours is "
            f"`{task.name}{plain(inspect.signature(function))}`: {problem}."
        )
    except ValueError:  # a built-in function without a signature
        return ""
    return ""


def plain(signature: inspect.Signature) -> str:
    """Write a signature without annotations."""
    return f"({', '.join(signature.parameters)})"


def judge(
    task: Task, cases: list[tuple[Any, ...]], outcomes: Sequence[Outcome], seed: int = 0
) -> Answer:
    """Turn what an attempt did on the inputs into an answer.

    It needs no function: a class is marked from outcomes that came from elsewhere.

    Raises:
        ValueError: outcomes are missing, though the last call did come to an end.
    """
    ended = outcomes and outcomes[-1].kind == "timed out"
    if len(outcomes) != len(cases) and not ended:
        raise ValueError(f"{len(outcomes)} outcomes for {len(cases)} inputs")
    wanted = task.expected(seed)
    for case, right, got in zip(cases, wanted, outcomes, strict=False):
        if wrong := finding(task, case, right, got):
            known = alike = None
            if got.kind != "timed out" and got.steady:
                known = known_mistake(task, cases, outcomes)
                alike = known_mistake(task, [case], [got])
            return failure(task, case, right, got, wrong, known, alike)
    parts = (Part(f"{task.proves} ({len(cases)} inputs.)"),)
    return Answer(
        task.name, "right", (*parts, *((Part(task.why),) if task.why else ()))
    )


def finding(
    task: Task, case: tuple[Any, ...], right: Outcome, got: Outcome
) -> Difference | None:
    """Say what is wrong with one call, or None."""
    if got.kind == "raised":
        unfinished = got.error.startswith("NotImplementedError")
        return Difference("unfinished" if unfinished else "raised", "", "", got.error)
    if got.kind == "timed out":
        return Difference("timed out", "", "", "")
    if not got.steady:
        return Difference("random", "", "", "")
    names = list(inspect.signature(task.solution).parameters)
    changed = [names[i] for i in got.changed if names[i] not in task.may_change]
    if changed:
        return Difference("changed", "", "", " and ".join(changed))
    try:
        pair = (observed(task, x.value, case) for x in (right, got))
        return difference(*pair, rtol=task.rtol, atol=task.atol)
    except Exception as problem:  # whatever a result of the wrong kind does to observe
        said = f"{problem}".partition("\n")[0][:120]
        note = f"it cannot be looked at: {said}"
        return Difference("type", "", describe(right.value), describe(got.value), note)


def observed(task: Task, value: Any, case: tuple[Any, ...]) -> Any:
    """Give what is compared of a result."""
    return task.observe(value, *case) if task.observe else value


def known_mistake(
    task: Task, cases: list[tuple[Any, ...]], outcomes: Sequence[Outcome]
) -> Mistake | None:
    """Find the one misconception that does exactly the same on every input, if any."""
    if len(outcomes) < len(cases):
        return None
    found = []
    for mistake in task.mistakes:
        pairs = zip(cases, outcomes, strict=True)
        if all(
            same(task, c, run(mistake.function, c, twice=False), o) for c, o in pairs
        ):
            found.append(mistake)
    return found[0] if len(found) == 1 else None


def same(task: Task, case: tuple[Any, ...], one: Outcome, other: Outcome) -> bool:
    """Say whether two calls did the same: result, exception, changed inputs."""
    if (one.kind, one.error, one.changed) != (other.kind, other.error, other.changed):
        return False
    try:
        pair = (observed(task, x.value, case) for x in (one, other))
        return one.kind == "raised" or not difference(
            *pair, rtol=task.rtol, atol=task.atol
        )
    except Exception:
        return difference(one.value, other.value) is None
