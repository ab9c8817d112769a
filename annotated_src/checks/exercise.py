"""What an exercise is: a task with its solution and mistakes, or a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from annotated_src.checks.draw import Draw
from annotated_src.checks.running import Outcome, run, seeded

Function = Callable[..., Any]
Cases = Callable[[Draw], Iterable[tuple[Any, ...]]]
DIFFICULTIES = ("easy", "moderate", "hard")


class Mistake(NamedTuple):
    """A known misconception, as a function that has it.

    `because` ends the sentence "People believe it because …"; `section` is the heading
    in the chapter that clears it up.
    """

    name: str
    because: str
    section: str
    function: Function


class Equivalent(NamedTuple):
    """A changed line of the solution that changes nothing, and why."""

    line: str
    because: str


class Choice(NamedTuple):
    """One answer to a question, and what to say to the reader who gives it."""

    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """What all exercises have: `minutes` is a guess, the second hint says more."""

    name: str
    chapter: str
    title: str
    minutes: int
    difficulty: str
    hints: tuple[str, str]
    section: str
    text: str
    why: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(
                f"difficulty {self.difficulty!r} is none of {DIFFICULTIES}"
            )
        if len(self.hints) != 2:
            raise ValueError(f"{self.name} has {len(self.hints)} hints, expected 2")


@dataclass(frozen=True, kw_only=True)
class Question(Exercise):
    """An exercise answered by a letter; each choice has an answer of its own."""

    choices: dict[str, Choice]
    right: str
    kind: str = "explain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.right not in self.choices:
            raise ValueError(f"{self.right!r} is none of {list(self.choices)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(Exercise):
    """An exercise answered by a function: written anew, or a broken one put right.

    `proves` says what has been proven of a function that passes. Values may differ by
    `atol` and `rtol`. `may_change` lists inputs that are there to be changed;
    `observe(result, *inputs)` turns a result into what is compared.
    """

    solution: Function
    proves: str
    atol: float = 1e-5
    rtol: float = 1e-4
    may_change: tuple[str, ...] = ()
    observe: Function | None = None
    makers: list[Cases] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    others: dict[str, Function] = field(default_factory=dict)
    equivalents: list[Equivalent] = field(default_factory=list)
    kind: str = "implement"

    def cases(self, maker: Cases) -> Cases:
        """Register the inputs: a generator of tuples of arguments. A decorator."""
        self.makers.append(maker)
        return maker

    def mistake(
        self, name: str, *, because: str, section: str = ""
    ) -> Callable[[Function], Function]:
        """Register a misconception, as a wrong solution. A decorator."""

        def register(function: Function) -> Function:
            place = section or self.section
            self.mistakes.append(Mistake(name, because, place, function))
            return function

        return register

    def broken(
        self, name: str, *, because: str, section: str = ""
    ) -> Callable[[Function], Function]:
        """Register the function that a debug exercise starts from. A decorator."""
        if self.kind != "debug" or self.mistakes:
            raise ValueError(f"{self.name} takes its broken function first, once")
        return self.mistake(name, because=because, section=section)

    def also(self, style: str) -> Callable[[Function], Function]:
        """Register another right solution, in another style. A decorator."""

        def register(function: Function) -> Function:
            self.others[style] = function
            return function

        return register

    def equivalent(self, line: str, *, because: str) -> None:
        """List a mutant that no test can kill, by its changed line."""
        self.equivalents.append(Equivalent(line, because))

    @property
    def given(self) -> Function | None:
        """The broken function that the reader gets, if this is a debug exercise."""
        return self.mistakes[0].function if self.kind == "debug" else None

    def inputs(self, seed: int = 0) -> list[tuple[Any, ...]]:
        """Draw the inputs, the smallest first.

        Raises:
            ValueError: a case is no tuple of arguments.
        """
        with seeded(seed):
            cases = [case for make in self.makers for case in make(Draw(seed))]
        for case in cases:
            if not isinstance(case, tuple):
                raise ValueError(f"{self.name}: a case is a tuple, got {case!r}")
        return sorted(cases, key=size)

    @functools.cache  # noqa: B019 - exercises live as long as the program
    def expected(self, seed: int = 0) -> list[Outcome]:
        """Run the solution on all inputs."""
        return [
            run(self.solution, case, 10.0, twice=False) for case in self.inputs(seed)
        ]


def size(value: Any) -> int:
    """Count the numbers and characters in an input, to show the smallest one."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, nn.Module):
        return size(value.state_dict())
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(size(x) for x in value.values())
    if isinstance(value, list | tuple | set):
        return sum(size(x) for x in value)
    return 1
