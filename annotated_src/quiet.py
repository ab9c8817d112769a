"""Keep a talkative library quiet while it works."""

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

STDERR = 2
# Two threads at once would each put back the other's silence, for ever.
_alone = threading.RLock()


@contextmanager
def quietly() -> Iterator[None]:
    """Let nothing be said: no logs, warnings, progress bars or C++ messages.

    What a library has to say of its own inner life is lost; errors are still raised.
    It holds for the whole process: a second thread waits for the first.
    """
    with (
        _alone,
        _to_nowhere(STDERR),  # C++ writes there, past sys.stderr
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _to_nowhere(number: int) -> Iterator[None]:
    try:
        kept = os.dup(number)
    except OSError:  # closed: another file must not take its number meanwhile
        kept = None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    try:
        yield
    finally:
        if kept is None:
            os.close(number)
        else:
            os.dup2(kept, number)
            os.close(kept)
