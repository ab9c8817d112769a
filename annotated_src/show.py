"""For every notebook: show source from the file under test, confirm claims."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.core.display import Markdown
from IPython.core.display_functions import display
from torch import Tensor

ROOT = Path(__file__).parents[1]


def show(*objects: object) -> None:
    """Display where each function, class or module lives, and its source on disk.

    Raises:
        TypeError: an object has no Python source.
    """
    for item in objects:
        plain: Any = inspect.unwrap(item) if callable(item) else item
        code = textwrap.dedent(inspect.getsource(plain)).rstrip()
        path = Path(inspect.getsourcefile(plain) or "").relative_to(ROOT)
        display(Markdown(f"`{path.as_posix()}`\n\n```python\n{code}\n```"))


def confirm(claim: str, holds: bool | Tensor) -> None:
    """Print the claim with a tick, or stop the notebook: claims here are checked.

    Raises:
        AssertionError: the claim does not hold.
        TypeError: holds is no bool and no tensor of one bool; a number or a list is
            no answer to a claim.
    """
    if isinstance(holds, Tensor) and holds.dtype == torch.bool and holds.numel() == 1:
        holds = bool(holds)
    if not isinstance(holds, bool | np.bool):
        raise TypeError(f"a claim is true or false, got {holds!r}")
    if not holds:
        raise AssertionError(f"does not hold: {claim}")
    print(f"✓ {claim}")  # noqa: T201 - a cell's output is what it is for
