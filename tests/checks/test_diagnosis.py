"""What a reader is told: each way of being wrong has an answer of its own."""

import re

import numpy as np
import pytest
import torch

from annotated_src.checks.answers import Part
from annotated_src.checks.chapter import Chapter
from annotated_src.checks.diagnosis import check_choice, check_function, judge
from annotated_src.checks.exercise import Choice
from annotated_src.checks.running import run

chapter = Chapter("llama/06_heads", "Sharing heads")


@chapter.implement(
    title="the mean",
    minutes=1,
    difficulty="easy",
    hints=("Add.", "Divide."),
    section="One family",
    text="Write the mean of each row.",
    proves="Rows of any length have their mean.",
    why="The sum over the count.",
)
def row_means(rows, scale):
    """(B, T) -> (B,), the means times scale."""
    return rows.mean(dim=-1) * scale


@row_means.cases
def _(draw):
    yield draw.normal(4, 5), 2.0
    yield draw.normal(1, 2), 3.0
    yield torch.ones(2, 2), 1.0


@row_means.mistake("the sum", because="it comes first.", section="Why it writes faster")
def _(rows, scale):
    return rows.sum(dim=-1) * scale


@row_means.mistake("columns", because="axis 0 is the first")
def _(rows, scale):
    return rows.mean(dim=0) * scale


chapter.explain(
    "which",
    title="which one",
    minutes=1,
    difficulty="easy",
    hints=("Not a.", "Not b."),
    section="One family",
    text="Which?",
    choices={
        "a": Choice("A", "Not A."),
        "b": Choice("B", "Not B."),
        "c": Choice("C", "It is C."),
    },
    right="c",
)


def told(attempt):
    answer = check_function(row_means, attempt, seconds=0.3)
    return answer, repr(answer).replace("Why\nit", "Why it")


def test_right():
    answer, text = told(lambda rows, scale: rows.sum(-1) / rows.shape[1] * scale)
    assert answer
    assert "✓ row_means: solved" in text
    assert "Rows of any length have their mean. (3 inputs.)" in text
    assert "The sum over the count." in text


def test_a_known_mistake_has_its_name_its_reason_and_its_section():
    answer, text = told(lambda rows, scale: scale * sum(rows.unbind(1)))
    assert not answer
    assert answer.mistake == "the sum"
    assert "Looks like: the sum. People believe it because it comes first." in text
    assert "“Why it writes faster” in notebooks/llama/06_heads.ipynb" in text
    markdown = answer._repr_markdown_()
    assert re.search(
        r"\[Why it writes faster\]\(.*06_heads\.ipynb#why-it-writes-faster\)", markdown
    )


def test_the_smallest_input_that_shows_it_is_shown():
    text = told(lambda rows, scale: scale * sum(rows.unbind(1)))[1]
    assert "rows = float32 (1, 2)" in text
    assert "scale = 3.0" in text
    # this one is right on the smallest input, and wrong on the next
    text = told(lambda rows, scale: rows.mean(-1) * scale + (scale == 1))[1]
    assert "rows = float32 (2, 2)" in text


def test_an_unknown_mistake_has_no_name():
    answer, text = told(lambda rows, scale: rows.mean(-1) * scale + 7)
    assert answer.kind == "values"
    assert answer.mistake == ""
    assert "Looks like" not in text
    assert "1 of 1 numbers differ" in text


def test_two_mistakes_at_once_are_told_by_what_shows_first():
    def two(rows, scale):
        return rows.sum(dim=-1) * scale + (len(rows) > 2)

    answer, text = told(two)
    assert answer.mistake == ""
    assert "On this input it does what this does: the sum." in text.replace("\n", " ")


def raises(rows, scale):
    return rows[0] + rows.reshape(77)


def changes(rows, scale):
    rows *= scale
    return rows.mean(-1)


def loops(rows, scale):
    while True:
        pass


def forgets(rows, scale):
    print("I was here")
    rows.mean(-1) * scale


def unfinished(rows, scale):
    raise NotImplementedError


KINDS = {
    "raised": (raises, "RuntimeError: shape '[77]' is invalid", "rows.reshape(77)"),
    "changed": (changes, "It changes its input in place: rows.", "rows = float32"),
    "timed out": (loops, "did not come to an end in time", "Does every", "scale = 3"),
    "unfinished": (unfinished, "still to be written", ""),
    "random": (lambda rows, scale: torch.rand(len(rows)), "without a seed", "rows ="),
    "type": (lambda rows, scale: rows.tolist(), "another kind of thing", "Expected:"),
    "shape": (lambda rows, scale: rows, "shape is wrong", "    (1,)\n\nYours:\n"),
    "dtype": (lambda r, s: (r.mean(-1) * s).double(), "dtype", "Yours:\n    float64"),
    "signature": (lambda rows: rows, "It is called as row_means(rows, scale)", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_own_words(kind):
    attempt, *words = KINDS[kind]
    answer, text = told(attempt)
    assert answer.kind == kind
    assert not answer
    for part in words:
        assert part in text


@pytest.mark.parametrize(
    ("made", "told_as"),
    [
        (lambda: (x for x in "ab"), "generator: <generator"),
        (lambda: loops, "function: loops"),
        (lambda: np.array(["a"]), "a numpy array of shape (1,)"),
        (lambda: torch.eye(2).to_sparse(), "(2, 2)"),
    ],
)
def test_a_result_of_a_strange_kind_is_told_as_such(made, told_as):
    answer, text = told(lambda rows, scale: made())
    assert answer.kind in ("type", "shape")
    assert told_as in text


def test_a_right_array_read_backwards_is_right():
    def backwards(rows, scale):
        means = rows.flip(0).mean(-1) * scale
        return means.numpy()[::-1]

    assert told(backwards)[0]


def test_what_is_raised_is_code_and_keeps_its_stars():
    answer, text = told(lambda rows, scale: rows ** "a**b")
    assert "TypeError: unsupported operand" in text
    assert 'rows ** "a**b"' in text
    shown = answer._repr_markdown_().split("```")
    assert 'rows ** "a**b"' in shown[1]
    assert "**" not in "".join(shown[2:])


def test_bold_is_for_markdown_and_a_power_is_no_bold():
    part = Part("**Bold.** Not `2 ** x`.")
    assert part.markdown() == "**Bold.** Not `2 ** x`."
    assert str(part) == "Bold. Not 2 ** x."


def test_a_forgotten_return_is_told_and_so_are_prints():
    answer, text = told(forgets)
    assert answer.kind == "type"
    assert "Is there a return?" in text
    assert "I was here" in text


def test_of_many_prints_the_first_are_told():
    def chatty(rows, scale):
        for i in range(1000):
            print("line", i)

    text = told(chatty)[1]
    assert "    line 0\n    line 1\n" in text
    assert "    line 7\n    …" in text
    assert "line 8" not in text


def test_an_input_that_is_there_to_be_changed_may_change():
    own = Chapter("llama/07_cache", "The KV cache")

    @own.implement(
        **{
            k: getattr(row_means, k)
            for k in ("title", "minutes", "difficulty", "hints")
        },
        section="x",
        text="x",
        proves="x",
        may_change=("kept",),
    )
    def keep(kept, x):
        """Append."""
        kept.append(x)
        return len(kept)

    keep.cases(lambda draw: [([1], 2)])
    assert check_function(keep, keep.solution)


def test_too_few_outcomes_are_no_success():
    cases = row_means.inputs()
    outcomes = [run(row_means.solution, case) for case in cases]
    assert judge(row_means, cases, outcomes)
    for some in ([], outcomes[:1]):
        with pytest.raises(ValueError, match=f"{len(some)} outcomes for 3 inputs"):
            judge(row_means, cases, some)


def test_choices_have_their_own_answers():
    assert repr(check_choice(chapter["which"], "A)")).startswith("✗ which: not solved")
    assert "Not B." in repr(check_choice(chapter["which"], "b"))
    assert check_choice(chapter["which"], "c")
    assert check_choice(chapter["which"], "?").kind == "unfinished"
    with pytest.raises(ValueError, match="choices a, b, c, got 'd'"):
        check_choice(chapter["which"], "d")


def test_two_hints_open_one_after_the_other():
    text = repr(chapter.show("row_means"))
    first, second = text.index("Add."), text.index("Divide.")
    assert first < text.index("Second hint") < second
    assert text.count("<details") == 2
    assert text.index("</details>") > second
    assert "def row_means(rows, scale):" in text
    assert "mean(dim=-1)" not in text
    assert "mean(dim=-1)" in repr(chapter.solution("row_means"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"difficulty": "tough"}, "difficulty 'tough' is none of"),
        ({"hints": ("one",)}, "row_means has 1 hints, expected 2"),
    ],
)
def test_what_is_no_exercise_is_refused(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        type(row_means)(**{**vars(row_means), **change})


def test_a_chapter_names_what_it_has():
    with pytest.raises(KeyError, match="row_means, which"):
        chapter["other"]
