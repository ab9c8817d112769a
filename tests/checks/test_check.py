"""`check` and `progress` as a reader calls them."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from annotated_src.checks import progress as keeping
from annotated_src.exercises import check, find, progress


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(keeping.PLACE, str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def my_repeat_kv(x, times):
    return x.repeat(1, times, 1, 1)


def test_three_wrong_ways_have_three_answers():
    def one(x, times):
        return x.repeat(1, times, 1, 1)

    def two(x, times):
        return x.repeat_interleave(times, dim=2)

    def three(x, times):
        return x.repeat_interleave(times)

    answers = []
    for attempt in (one, two, three):
        attempt.__name__ = "my_repeat_kv"
        answers.append(check(attempt))
    assert not any(answers)
    assert [a.kind for a in answers] == ["values", "shape", "shape"]
    assert answers[0].mistake == "repeat for repeat_interleave"
    assert answers[1].mistake == "tokens for heads"
    assert len({repr(a) for a in answers}) == 3


def test_check_notes_what_is_solved():
    def repeat_kv(x, times):
        return torch.cat(
            [x[:, n : n + 1] for n in range(x.shape[1]) for _ in range(times)], 1
        )

    assert not check(my_repeat_kv)
    assert progress().solved == 0
    assert check(repeat_kv)
    assert check("what_gqa_speeds_up", "c")
    assert progress().solved == 2
    assert progress().total >= 60


def test_an_answer_comes_even_if_progress_cannot_be_kept(file):
    file.mkdir()
    answer = check(my_repeat_kv)
    assert answer.mistake == "repeat for repeat_interleave"
    assert "Progress could not be kept" in repr(answer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x,), ValueError, "'<lambda>'; a function has the name of its"),
        (("what_gqa_speeds_up", 2), ValueError, "choices a, b, c, d, got '2'"),
        (("repeat_kv",), TypeError, r"repeat_kv wants a function: check\(repeat_kv\)"),
        (("what_gqa_speeds_up",), TypeError, r'check\("what_gqa_speeds_up", "a"\)'),
        (("what_gqa_speeds_up", "x"), ValueError, "choices a, b, c, d, got 'x'"),
        ((3,), TypeError, "a function or a question's name, got 3"),
        (("repeat_vk",), ValueError, "did you mean repeat_kv"),
    ],
)
def test_bad_calls_are_refused(arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        check(*arguments)


def test_a_question_is_no_function():
    def what_gqa_speeds_up():
        pass

    with pytest.raises(TypeError, match="is a question"):
        check(what_gqa_speeds_up)


def test_the_books_own_function_is_no_solution():
    from annotated_src.attention import repeat_kv

    answer = check(repeat_kv)
    assert not answer
    assert "the book's own function" in repr(answer)
    assert progress().solved == 0


def test_my_is_left_out():
    assert find("my_repeat_kv") is find("repeat_kv")


def test_a_fresh_kernel_answers_without_network_and_without_heavy_libraries(file):
    script = """
        import socket, sys, time
        import torch
        def refuse(*args):
            raise AssertionError("the network was asked")
        socket.socket.connect = socket.getaddrinfo = refuse
        from annotated_src.exercises import check
        def repeat_kv(x, times):
            return x.repeat(1, times, 1, 1)
        start = time.process_time()
        print(check(repeat_kv).mistake)
        print(time.process_time() - start < 2.5)
        heavy = {"transformers", "matplotlib", "litert_torch", "torchao", "nbgrader"}
        print(sorted(heavy & sys.modules.keys()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["repeat for repeat_interleave", "True", "[]"]


def test_the_readme_tells_what_check_says():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    (block,) = (b for b in readme.split("```")[1::2] if "import check" in b)
    typed = [line[4:] for line in block.splitlines() if line[:4] in (">>> ", "... ")]
    names = {}
    exec("\n".join(typed[:-1]), names)
    answer = repr(eval(typed[-1], names))
    assert block.partition(">>> check(repeat_kv)\n")[2].strip() == answer
