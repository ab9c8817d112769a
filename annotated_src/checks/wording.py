"""The words of an answer to a wrong attempt."""

from __future__ import annotations

import inspect
from typing import Any

from annotated_src.checks.answers import Answer, Link, Part
from annotated_src.checks.comparing import Difference
from annotated_src.checks.describing import describe
from annotated_src.checks.exercise import Mistake, Task
from annotated_src.checks.running import Outcome

WORDS = {
    "unfinished": "It is still to be written: it raises `NotImplementedError`.",
    "raised": "It raises an exception:",
    "timed out": "It did not come to an end in time. Does every loop end?",
    "random": "Two calls with the same inputs gave different results. Something in it "
    "is random without a seed, or remembers the call before.",
    "type": "It gives back another kind of thing.",
    "shape": "The shape is wrong.",
    "length": "There are too many items, or too few.",
    "keys": "These are other keys.",
    "dtype": "The shape is right, the dtype is wrong.",
    "values": "Shape and type are right, the values are not.",
}


def failure(
    task: Task,
    case: tuple[Any, ...],
    right: Outcome,
    got: Outcome,
    wrong: Difference,
    mistake: Mistake | None,
    alike: Mistake | None,
) -> Answer:
    """Write the answer to a wrong attempt: input, expected, actual, and the mistake."""
    words = WORDS.get(wrong.kind, "")
    if wrong.kind == "changed":
        words = f"It changes its input in place: {wrong.actual}. Work on a copy."
    fair = any(outcome.value is None for outcome in task.expected())
    if got.kind == "returned" and got.value is None and not fair:
        words = "It gives back `None`. Is there a `return`?"
    # what was raised, and the line: as code, since either may hold Markdown
    raised = f"{wrong.actual}\n{got.line}".strip() if wrong.kind == "raised" else ""
    parts = [Part(f"**{words}**", raised)]
    if wrong.kind != "unfinished":
        parts.append(Part("The smallest input that shows it:", arguments(task, case)))
    if wrong.expected:
        at = f" at `{wrong.where}`" if wrong.where else ""
        parts.append(Part(f"Expected{at}:", wrong.expected))
        note = f" ({wrong.note})" if wrong.note else ""
        parts.append(Part(f"Yours{at}{note}:", wrong.actual))
    if got.printed:
        parts.append(Part("It printed:", beginning(got.printed)))
    if mistake:
        parts.append(explained("Looks like", mistake, task))
    elif alike:
        parts.append(explained("On this input it does what this does", alike, task))
    return Answer(task.name, wrong.kind, tuple(parts), mistake.name if mistake else "")


def beginning(text: str, lines: int = 8, size: int = 400) -> str:
    """Cut a long text off."""
    short = "\n".join(text[:size].splitlines()[:lines]).rstrip()
    return short if short == text.rstrip() else f"{short}\n…"


def explained(how: str, mistake: Mistake, task: Task) -> Part:
    """Name a mistake, say why people believe it, and where to read again."""
    text = f"**{how}: {mistake.name}.** People believe it because "
    text += f"{mistake.because.rstrip('.')}. Read again:"
    return Part(text, link=Link(task.chapter, mistake.section))


def arguments(task: Task, case: tuple[Any, ...]) -> str:
    """Write the inputs of a call, a line or a few each."""
    names = inspect.signature(task.solution).parameters
    pairs = zip(names, case, strict=False)
    return "\n".join(f"{name} = {describe(value)}" for name, value in pairs)
