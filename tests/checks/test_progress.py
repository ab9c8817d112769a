"""Progress is kept: through crashes, damaged files and several kernels at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from annotated_src.checks import progress
from annotated_src.checks.progress import Progress, record
from annotated_src.exercises.heads import chapter


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "progress.json"
    monkeypatch.setenv(progress.PLACE, str(path))
    return path


def test_attempts_are_counted_and_a_solved_one_stays_solved(file):
    for solved in (False, True, False):
        record("repeat_kv", solved)
    stored = json.loads(file.read_text())["exercises"]
    assert stored == {"repeat_kv": {"attempts": 3, "solved": True}}


def test_the_map_shows_what_is_solved(file):
    assert "○○○○" in repr(Progress([chapter]))
    record("tokens_that_fit", True)
    record("repeat_kv", False)
    shown = Progress([chapter])
    assert (shown.solved, shown.total) == (1, 4)
    assert repr(shown) == "Sharing heads  ○●○○\n1 of 4 solved"
    assert "| Sharing heads | ○●○○ |" in shown._repr_markdown_()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"exercises": 3}', '{"exercises": {"a": {}}}', "\x00\xff"]
)
def test_a_damaged_file_is_kept_aside(file, text):
    file.parent.mkdir()
    file.write_text(text, "utf-8")
    record("repeat_kv", True)
    assert json.loads(file.read_text())["exercises"]["repeat_kv"]["solved"]
    assert file.with_suffix(".damaged").read_text("utf-8") == text


def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file(file, monkeypatch):
    record("repeat_kv", True)
    before = file.read_bytes()

    def crash(*args, **kwargs):
        args[1].write('{"exercises": {"rep')
        raise OSError("disk full")

    monkeypatch.setattr(progress.json, "dump", crash)
    with pytest.raises(OSError, match="disk full"):
        record("tokens_that_fit", True)
    assert file.read_bytes() == before


def test_a_process_killed_at_any_time_leaves_a_whole_file(file):
    script = """
        from annotated_src.checks.progress import record
        print("ready", flush=True)
        for i in range(100_000):
            record(f"exercise {i}", True)
    """
    for pause in (0.05, 0.13, 0.21):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            env=os.environ | {progress.PLACE: str(file)},
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        entries = json.loads(file.read_text())["exercises"]
        assert entries
        assert all(entry["solved"] for entry in entries.values())
    assert not file.with_suffix(".damaged").exists()


def test_kernels_side_by_side_lose_nothing(file):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: record(f"e{i}", True), range(40)))
    assert len(json.loads(file.read_text())["exercises"]) == 40
    assert not list(file.parent.glob("*.part"))
