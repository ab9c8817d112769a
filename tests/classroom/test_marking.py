"""Students' code in a process apart: marks for what is right, words for all else."""

import functools
import types

import pytest

from annotated_src.checks.answers import Answer
from annotated_src.checks.source import source_of
from annotated_src.classroom.child import Child, Limits, closed_folders
from annotated_src.classroom.course import chapter_named
from annotated_src.classroom.inside import guard, landlock
from annotated_src.classroom.marking import Asked, Cell, mark, outcome_of

CHAPTER = chapter_named("heads")
RIGHT = source_of(CHAPTER["repeat_kv"].solution, "repeat_kv")
WRONG = "def repeat_kv(x, times):\n    return x.repeat(1, times, 1, 1)"
LIMITS = Limits(cell=1.0, call=1.0, notebook=100.0, memory=512)
HEADS = "annotated_src/exercises/heads.py"
ROOT = closed_folders(None)[0]

# Each cell is one attempt; what comes behind it says what the cell must end with.
ATTEMPTS = {
    "import os, torch, ctypes": "",
    "%matplotlib inline\n!ls /\nfrom annotated_src.exercises import check": "",
    "%%time\nset_by_magic = 1": "",
    "set_by_magic": "",
    "check(print)": "",
    "from annotated_src.exercises.heads import repeat_kv": "ModuleNotFoundError",
    "import sys; sys.path.insert(0, ROOT)": "",
    "import importlib.util as u\n"
    "s = u.spec_from_file_location('heads', f'{ROOT}/HEADS')\n"
    "s.loader.exec_module(u.module_from_spec(s))": "PermissionError",
    "open(f'{ROOT}/HEADS').read()": "PermissionError",
    "os.open(f'{ROOT}/HEADS', os.O_RDONLY)": "PermissionError",
    "os.chdir(f'{ROOT}/annotated_src/exercises'); open('heads.py')": "PermissionError",
    "os.symlink(f'{ROOT}/HEADS', 'here.py')": "PermissionError",
    "open(f'{ROOT}/notebooks/llama/06_heads.ipynb')": "PermissionError",
    "open(f'{ROOT}/gradebook.db', 'w')": "PermissionError",
    "open(f'{os.path.dirname(os.getcwd())}/other', 'w')": "PermissionError",
    "os.fork()": "PermissionError",
    "os.system('ls')": "PermissionError",
    "import subprocess; subprocess.run(['ls'])": "PermissionError",
    "import multiprocessing as m; m.Process(target=print).start()": "PermissionError",
    "import socket; socket.create_connection(('127.0.0.1', 80))": "PermissionError",
    "import urllib.request as r; r.urlopen('http://127.0.0.1')": "PermissionError",
    "os.kill(os.getppid(), 9)": "PermissionError",
    "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 1))": "PermissionError",
    "ctypes.CDLL(None).fork()": "PermissionError",
    "sys.exit(0)": "SystemExit",
    "quit()": "SystemExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "def broken(:": "SyntaxError",
    "class Sly(Exception):\n  def __str__(self): raise self\nraise Sly": "Sly",
    "torch.zeros(10**12)": "RuntimeError",
    "open(os.environ['HOME'] + '/mine.txt', 'w').write('my own folder')": "",
}


@functools.cache
def ended():
    """Run all attempts in one notebook, then mark two exercises in it."""
    cells = [Cell(f"ROOT = {ROOT!r}")]
    cells += [Cell(text.replace("HEADS", HEADS)) for text in ATTEMPTS]
    steps = [*cells, Asked(CHAPTER["repeat_kv"]), Cell(RIGHT), *ask("repeat_kv")]
    _, *notes, before, _, after = mark(steps, 3, LIMITS)
    return dict(zip(ATTEMPTS, notes, strict=True)), before, after


def ask(*names):
    return [Asked(CHAPTER[name]) for name in names]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_cell_gets_no_further_than_it_may(attempt):
    note = ended()[0][attempt]
    wanted = ATTEMPTS[attempt]
    assert note.error.partition(":")[0] == wanted, note
    assert note.kind == ("raised" if wanted else "ran")


def test_after_all_of_it_honest_work_still_counts():
    _, before, after = ended()
    assert before.kind == "missing"
    assert "There is no function repeat_kv" in repr(before)
    assert "A cell before this one stopped: RuntimeError" in repr(before)
    assert after
    assert after.kind == "right"


def test_nothing_in_the_process_decides_about_marks():
    patches = """
import annotated_src.checks.comparing as c, annotated_src.checks.diagnosis as d, torch
torch.equal = torch.allclose = torch.isclose = lambda *a, **k: torch.tensor(True)
c.difference = c.tensor_difference = d.difference = lambda *a, **k: None
d.judge = d.finding = lambda *a, **k: None
class Yes:
    shape = dtype = property(lambda self: self)
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    __hash__ = None
def tokens_that_fit(num_bytes, num_layers, num_heads, num_kv_heads, head_dim):
    return Yes()
what_gqa_speeds_up = Yes()
"""
    forged = """
import annotated_src.classroom.inside.worker as w
w.called = lambda *a: {"kind": "called", "outcomes": []}
"""
    names = ("repeat_kv", "tokens_that_fit", "what_gqa_speeds_up")
    steps = [Cell(WRONG), Cell(patches), *ask(*names), Cell(forged), *ask("repeat_kv")]
    notes = mark(steps, 3, LIMITS)
    answers = [n for n in notes if isinstance(n, Answer)]
    assert not any(answers)
    assert [n.kind for n in notes if not isinstance(n, Answer)] == ["ran"] * 3
    values, yes, letter, none = answers
    assert (values.kind, values.mistake) == ("values", "repeat for repeat_interleave")
    assert yes.kind == "type"
    assert "an object of type Yes" in repr(yes)
    assert "It takes one of a, b, c, d" in repr(letter)
    assert "0 results for 4 inputs" in repr(none)


def test_what_ends_the_process_costs_only_itself():
    deaf = "while True:\n  try:\n    while True: pass\n  except BaseException: pass"
    steps = [
        Cell("import os, threading, time\nhoard = []"),
        Cell("threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"),
        Cell("while True: hoard.append(bytes(10**7))"),
        Cell("print('x' * 10**7)\nwhile True: print('x' * 1000)"),
        Cell("os._exit(0)"),
        Cell(deaf),
        Cell(RIGHT + "\nwhat_gqa_speeds_up = ' C) '"),
        *ask("what_gqa_speeds_up", "repeat_kv"),
        Cell(f"def repeat_kv(x, times):\n  {deaf.replace(chr(10), chr(10) + '  ')}"),
        *ask("repeat_kv"),
        Cell("def repeat_kv(x, times): os._exit(0)"),
        *ask("repeat_kv"),
        Cell("def repeat_kv(x): return x"),
        *ask("repeat_kv"),
        Cell(WRONG.replace("return", "x += 1; return")),
        *ask("repeat_kv"),
    ]
    found = mark(steps, 3, LIMITS)
    notes = [n for n in found if not isinstance(n, Answer)]
    kinds = ["ran", "ran", "raised", "timed out", "stopped", "timed out", *["ran"] * 5]
    assert [n.kind for n in notes] == kinds
    assert notes[2].error == "MemoryError"
    assert notes[3].printed == "x" * 2000
    assert "ended the whole process, with status 0" in notes[4].error
    question, right, endless, ending, signature, changed = (
        n for n in found if isinstance(n, Answer)
    )
    assert question
    assert right
    assert "did not come to an end" in repr(endless)
    assert "It ended the whole process" in repr(ending)
    assert signature.kind == "signature"
    assert changed.kind == "changed"
    assert not any((endless, ending, signature, changed))


def test_whoever_meddles_with_the_messages_is_told_so():
    meddle = """
import os
message = b'{"kind": "called", "outcomes": [], "error": ""}'
for number in range(3, 64):
    try: DO
    except OSError: pass
"""
    write = "os.write(number, len(message).to_bytes(8, 'big') + message)"
    forge, close = (meddle.replace("DO", x) for x in (write, "os.close(number)"))
    steps = [Cell(forge), Cell(close), Cell(RIGHT), *ask("repeat_kv")]
    forged, closed, honest, answer = mark(steps, 3, LIMITS)
    assert forged.error == "It sent something unreadable."
    assert "It ended the whole process" in closed.error
    assert honest.kind == "ran"
    assert answer


def test_a_notebook_has_an_end():
    limits = Limits(cell=60.0, call=60.0, notebook=4.0)
    steps = [Cell("import time; time.sleep(60)"), Cell("1"), *ask("repeat_kv")]
    stopped, late, answer = mark(steps, 3, limits)
    assert stopped.kind == late.kind == "stopped"
    assert "The time for the whole notebook was over" in late.error
    assert "The time for the whole notebook was over" in repr(answer)
    assert not answer


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"kind": "right", "changed": [], "steady": True},
        {"kind": "returned", "changed": [7], "steady": True},
        {"kind": "returned", "changed": [True], "steady": True},
        {"kind": "returned", "changed": "0", "steady": True},
        {"kind": "returned", "changed": [], "steady": 1},
        {"kind": ["returned"], "changed": [], "steady": True},
        {"kind": "returned", "changed": [], "steady": True, "value": [1]},
    ],
)
def test_a_claim_that_is_none_is_refused(told):
    with pytest.raises(ValueError, match=r"no outcome|no plain data"):
        outcome_of(told, (1, 2))


def test_the_kernel_closes_files_to_those_who_go_round_python():
    child = Child(LIMITS)
    assert child.closed == (landlock.offered() > 0)
    source = (
        f"import torch\ntorch.from_file('{ROOT}/{HEADS}', size=9, dtype=torch.uint8)"
    )
    told = child.ask({"ask": "run", "source": source, "number": 1, "seconds": 5}, 9.0)
    child.close()
    assert ("Permission denied" in told["error"]) == child.closed, told
    assert child.process.poll() is not None
    assert not child.work.exists()


def test_open_folders_keep_what_is_secret_inside_them(tmp_path):
    for name in ("a/b/secret/x", "a/b/open/y", "a/c/z"):
        (tmp_path / name).mkdir(parents=True)
    names, files = landlock.around(
        [str(tmp_path / "a")], [str(tmp_path / "a/b/secret")]
    )
    assert names == [str(tmp_path / "a"), str(tmp_path / "a/b")]
    assert sorted(files) == [str(tmp_path / "a/b/open"), str(tmp_path / "a/c")]


def test_a_fence_knows_its_folders(tmp_path):
    for name in ("course/env", "work"):
        (tmp_path / name).mkdir(parents=True)
    place = types.SimpleNamespace(
        **{n: str(tmp_path / n) for n in ("course", "course/env", "work")}
    )
    opened = vars(place)["course/env"]
    fence = guard.Fence([place.course], [opened], place.work)
    assert fence.hidden(f"{place.course}/gradebook.db")
    assert fence.hidden(f"{place.work}/../course/gradebook.db")
    assert not fence.hidden(f"{opened}/lib.py")
    assert not fence.hidden(f"{place.course}2/lib.py")
    assert fence.fixed(f"{place.course}2/lib.py")
    beside = closed_folders(tmp_path / "course")[1:]
    assert beside == [place.course, str(tmp_path / "solutions")]
    installed = guard.Fence([f"{opened}/secret"], [opened], place.work)
    assert installed.hidden(f"{opened}/secret/heads.py")
    assert not installed.hidden(f"{opened}/lib.py")
    assert not fence.fixed(f"{place.work}/mine.txt")
