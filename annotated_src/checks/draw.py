"""Random inputs for exercises: the same on every machine for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Bound = float | int


class Draw:
    """A source of inputs. `check` uses seed 0; a class is marked with another."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def float32(self, kind: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Draw in float32, whatever the default of whoever checks."""
        return kind(shape, generator=self.generator, dtype=torch.float32)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers with mean 0 and variance 1, of any shape."""
        return self.float32(torch.randn, shape).to(dtype)

    def uniform(self, *shape: int, low: Bound = 0, high: Bound = 1) -> Tensor:
        """Numbers between low and high, of any shape."""
        return low + (high - low) * self.float32(torch.rand, shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high - 1, of any shape, int64."""
        return torch.randint(low, high, shape, generator=self.generator)

    def integer(self, low: int, high: int) -> int:
        """One whole number from low to high - 1."""
        return int(self.integers(low, high))

    def permutation(self, count: int) -> list[int]:
        """Give the numbers from 0 to count - 1 in another order."""
        return torch.randperm(count, generator=self.generator).tolist()
