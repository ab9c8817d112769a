import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from annotated_src.loss import IGNORE, next_token_loss

GOLDEN = Path(__file__).parent / "golden" / "chatglm6b"


def some(batch_size=2, num_tokens=5, vocab_size=7):
    logits = 3 * torch.randn(batch_size, num_tokens, vocab_size)
    return logits, torch.randint(vocab_size, (batch_size, num_tokens))


def by_loops(logits, labels, ignore_index=IGNORE):
    """One label after the other, in Python's float64."""
    surprises = []
    for scores, row in zip(logits.tolist(), labels.tolist(), strict=True):
        for t in range(len(row) - 1):
            if row[t + 1] != ignore_index:
                total = sum(math.exp(score) for score in scores[t])
                surprises.append(math.log(total) - scores[t][row[t + 1]])
    return sum(surprises) / len(surprises)


@pytest.mark.parametrize(
    ("precision", "case", "tolerance"),
    [
        ("fp32", "gmask_train", 1e-6),
        ("fp32", "mask_train", 1e-6),
        ("fp32", "batch_rightpad", 1e-6),
        ("fp16", "gmask_train", 1e-3),
        ("fp16", "mask_train", 1e-3),
    ],
)
def test_it_is_the_original_s(precision, case, tolerance):
    model = load_file(GOLDEN / f"model_{precision}.safetensors")
    labels = load_file(GOLDEN / "ids.safetensors")[f"{case}/labels"]
    found = next_token_loss(model[f"{case}/logits"], labels)
    expected = model[f"{case}/loss"]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_it_is_the_mean_over_labels_that_count_not_over_rows():
    logits, labels = some()
    labels[0, :4] = IGNORE  # row 0 counts once, row 1 four times
    found = next_token_loss(logits, labels)
    assert found.item() == pytest.approx(by_loops(logits, labels), rel=1e-6)
    rows = [by_loops(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert found.item() != pytest.approx(sum(rows) / 2, rel=1e-2)


def test_equal_scores_give_the_logarithm_of_the_vocabulary():
    labels = torch.tensor([[0, 3, 6]])
    found = next_token_loss(torch.full((1, 3, 7), 2.5), labels)
    assert found.item() == pytest.approx(math.log(7), rel=1e-6)


def test_the_last_scores_and_the_first_label_do_not_matter():
    logits, labels = some()
    expected = next_token_loss(logits, labels)
    logits[:, -1], labels[:, 0] = 100.0, IGNORE
    assert torch.equal(next_token_loss(logits, labels), expected)


def test_only_scores_before_a_label_that_counts_are_trained():
    logits, labels = some()
    labels[0, 2] = labels[1, 4] = IGNORE
    logits.requires_grad_()
    next_token_loss(logits, labels).backward()
    trained = (logits.grad != 0).any(dim=-1)
    assert trained.tolist() == [
        [True, False, True, True, False],
        [True, True, True, False, False],
    ]


def test_another_ignore_index_may_be_in_the_vocabulary():
    logits, labels = some()
    labels[:, 1:3] = 0
    found = next_token_loss(logits, labels, ignore_index=0)
    assert found.item() == pytest.approx(by_loops(logits, labels, 0), rel=1e-6)
    assert found.item() != pytest.approx(by_loops(logits, labels), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_in_float32_and_returns_what_it_was_given(dtype):
    # Half cannot add up 60000 shares of 1: the sum is beyond its largest number.
    logits = torch.zeros(1, 2, 70_000, dtype=dtype)
    found = next_token_loss(logits, torch.tensor([[0, 1]]))
    assert found.dtype == dtype
    assert found == torch.tensor(math.log(70_000)).to(dtype)


def test_labels_may_be_int32():
    logits, labels = some()
    assert torch.equal(
        next_token_loss(logits, labels.int()), next_token_loss(logits, labels)
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (2, 5, 1), (10,)])
def test_labels_of_another_shape_are_refused(shape):
    message = r"got \(2, 5, 7\) and " + str(shape).replace("(", r"\(").replace(
        ")", r"\)"
    )
    with pytest.raises(ValueError, match=message):
        next_token_loss(some()[0], torch.zeros(shape, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
def test_logits_of_other_dimensions_are_refused():
    logits, labels = some()
    with pytest.raises(ValueError, match=r"got \(5, 7\) and \(5,\)"):
        next_token_loss(logits[0], labels[0])
    with pytest.raises(ValueError, match=r"got \(2, 5, 7, 1\) and \(2, 5\)"):
        next_token_loss(logits[..., None], labels)


@pytest.mark.parametrize("label", [-1, 7, -101, 130_000])
def test_a_label_outside_the_vocabulary_is_refused(label):
    logits, labels = some()
    labels[1, 3] = label
    with pytest.raises(ValueError, match=rf"label {label} .* 0 to 6, .*\(-100\)"):
        next_token_loss(logits, labels)


@pytest.mark.parametrize(("batch_size", "num_tokens"), [(2, 1), (2, 0), (0, 5)])
def test_too_few_tokens_are_refused(batch_size, num_tokens):
    message = rf"nothing to predict: of labels \({batch_size}, {num_tokens}\)"
    with pytest.raises(ValueError, match=message):
        next_token_loss(*some(batch_size, num_tokens))


def test_nothing_that_counts_is_refused_where_torch_gives_nan():
    logits, labels = some()
    labels[:, 1:] = IGNORE  # the first of a row does not count anyway
    with pytest.raises(ValueError, match=r"nothing .* ignore_index \(-100\)"):
        next_token_loss(logits, labels)
    scores, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.nn.functional.cross_entropy(scores, targets).isnan()
