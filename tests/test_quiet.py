"""Silence, and that all is as it was afterwards."""

import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest

from annotated_src.quiet import quietly


def test_it_lets_nothing_out_and_gives_all_back(capfd):
    with quietly(), quietly():
        os.write(2, b"from C++")
        sys.stdout.write("bar")
        sys.stderr.write("progress")
        logging.getLogger("loud").warning("log")
        warnings.warn("careful", FutureWarning, stacklevel=1)
    with pytest.raises(KeyError, match="still raised"), quietly():
        raise KeyError("still raised")
    os.write(2, b"heard")
    sys.stdout.write("said")
    assert capfd.readouterr() == ("said", "heard")
    with pytest.warns(FutureWarning):
        warnings.warn("careful", FutureWarning, stacklevel=1)


def test_logs_that_were_off_stay_off():
    logging.disable(logging.ERROR)
    try:
        with quietly():
            assert logging.root.manager.disable == logging.ERROR
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


def test_threads_do_not_keep_each_others_silence(capfd):
    """The one that enters first leaves first; the second must not put silence back."""
    inside, entering = threading.Event(), threading.Event()

    def first():
        with quietly():
            inside.set()
            entering.wait(5)

    def second():
        inside.wait(5)
        threading.Timer(0.1, entering.set).start()
        with quietly():
            sys.stdout.write("bar")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    os.write(2, b"heard")
    sys.stdout.write("said")
    assert capfd.readouterr() == ("said", "heard")


WITHOUT_STDERR = """
import os, sys
from annotated_src.quiet import quietly

def is_open():
    try:
        return bool(os.fstat(2))
    except OSError:
        return False

found = [is_open(), sys.stderr]
with quietly():
    os.write(2, b"from C++")
    found.append(os.open(sys.argv[1], os.O_RDONLY) > 2)
print(found, is_open())
"""


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor in a shell")
def test_it_works_where_stderr_is_closed():
    done = subprocess.run(
        [
            "sh",
            "-c",
            '"$0" -c "$1" "$2" 2>&-',
            sys.executable,
            WITHOUT_STDERR,
            __file__,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[False, None, True] False\n"
