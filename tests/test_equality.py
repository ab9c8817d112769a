"""Ours against transformers, quantity by quantity; it writes a page of the book."""

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import logits_process

from annotated_src import sampling
from annotated_src.architectures import ARCHITECTURES
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.generate import generate
from annotated_src.loss import IGNORE, next_token_loss
from annotated_src.sampler import Sample
from annotated_src.tokenizer import TextTokenizer

PAGE = Path(__file__).resolve().parents[1] / "book" / "equality_llama.md"
NEW = 64
TEXT = """A decoder reads a text from left to right. At each token it may look at those
before it and at none behind, and it says how likely it holds every token of its
vocabulary to come next. 你好，世界! 3.14159 🦙"""
QUESTION = [{"role": "user", "content": "What is the capital of France, and why?"}]


class Check(NamedTuple):
    model: str
    quantity: str
    seen: float
    allowed: float  # 0: exact


ALLOWED = {"logits": 1e-4, "loss": 1e-5, "gradients": 1e-4, "greedy ids": 0}
REAL_ALLOWED = ALLOWED | {"logits": 1e-3, "gradients": 1e-3}


def largest(found, expected):
    return (found - expected).abs().max().item()


def compare(name, ours, theirs, tokens, prompt, allowed):
    """Yield a check for every quantity. Gradients: relative to the largest of each."""
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 1
        seen = {"logits": largest(ours(tokens), expected)}
    labels = tokens.clone()
    labels[:, 2:5] = IGNORE
    loss = next_token_loss(ours(tokens), labels)
    expected = theirs(tokens, labels=labels).loss
    seen["loss"] = largest(loss, expected)
    loss.backward()
    expected.backward()
    weights = dict(theirs.named_parameters())
    names = names_by_layer(ours, ARCHITECTURES[theirs.config.model_type].names)
    assert len(names) == len(weights) == len(dict(ours.named_parameters()))
    seen["gradients"] = max(
        largest(ours.get_parameter(here).grad, weights[there].grad)
        / weights[there].grad.abs().max().item()
        for there, here in names.items()
    )
    ours.zero_grad()
    theirs.zero_grad()
    ids = generate(ours, prompt, max_new_tokens=NEW)
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    greedy = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options
    )
    assert ids.shape == greedy.shape
    seen["greedy ids"] = (ids != greedy).sum().item()
    return [Check(name, what, value, allowed[what]) for what, value in seen.items()]


@pytest.fixture(scope="module")
def check_random(make_decoder):
    @functools.cache
    def check(name):
        found = make_decoder(name, context=128)
        assert len(list(found.path.glob("*.safetensors"))) > 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            tokens = torch.randint(0, 97, (3, 40))
        ours, theirs = found.model, found.reference
        return compare(name, ours, theirs, tokens, tokens[:, :7], ALLOWED)

    return check


@pytest.fixture(scope="module")
def real(smollm2_dir):
    ours = load_model(smollm2_dir)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    tokenizer = TextTokenizer.from_pretrained(smollm2_dir)
    tokens, prompt = tokenizer.encode(TEXT), tokenizer.chat(QUESTION)
    return compare("SmolLM2-135M", ours, theirs, tokens, prompt, REAL_ALLOWED)


def processors():
    """Yield a check for every filter of the scores, on scores that are not easy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        ties = torch.randint(-2, 3, (40, 97)).float()
        wide = 30 * torch.randn(40, 97)
        some = torch.randn(40, 97).masked_fill(torch.rand(40, 97) < 0.4, -torch.inf)
        scores = torch.cat((ties, wide, some, torch.full((1, 97), 1.5)))
        tokens = torch.randint(0, 97, (len(scores), 12))
    knobs = {
        "repetition_penalty": 1.3,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
    }
    pairs = {
        "RepetitionPenaltyLogitsProcessor": sampling.repetition_penalty(
            scores, tokens, 1.3
        ),
        "TemperatureLogitsWarper": sampling.temperature(scores, 0.7),
        "TopKLogitsWarper": sampling.top_k(scores, 20),
        "TopPLogitsWarper": sampling.top_p(scores, 0.9),
        "MinPLogitsWarper": sampling.min_p(scores, 0.05),
    }
    for (symbol, found), (name, value) in zip(
        pairs.items(), knobs.items(), strict=True
    ):
        expected = getattr(logits_process, symbol)(value)(tokens, scores.clone())
        here = f"{{py:func}}`{name} <annotated_src.sampling.{name}>`"
        yield Check(f"`{symbol}`", here, apart(found, expected), 0)
    config = GenerationConfig(do_sample=True, **knobs)
    model = AutoModelForCausalLM.from_config(small_config())
    chain = model._get_logits_processor(config, input_ids_seq_length=12)
    assert len(chain) == 5
    expected = chain(tokens, scores.clone()).softmax(dim=-1)
    found = Sample(**knobs).probabilities(scores, tokens)
    here = "{py:class}`Sample <annotated_src.sampler.Sample>`"
    yield Check("`_get_logits_processor`, softmax", here, apart(found, expected), 0)


def apart(found, expected):
    """Largest difference; infinity if one excludes what the other does not."""
    if not torch.equal(found == -torch.inf, expected == -torch.inf):
        return torch.inf
    return (found - expected).nan_to_num(nan=0.0).abs().max().item()


def small_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=97,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )


def within(check):
    return check.seen <= check.allowed


@pytest.mark.parametrize("quantity", ALLOWED)
def test_a_random_llama_equals_transformers(check_random, llama_name, quantity):
    (check,) = (c for c in check_random(llama_name) if c.quantity == quantity)
    assert within(check), check


@pytest.mark.parametrize("quantity", ALLOWED)
def test_a_random_gemma_or_phi_equals_transformers(
    check_random, decoder_name, quantity
):
    (check,) = (c for c in check_random(decoder_name) if c.quantity == quantity)
    assert within(check), check


@pytest.mark.parametrize("quantity", ALLOWED)
def test_the_real_model_equals_transformers(real, quantity):
    (check,) = (c for c in real if c.quantity == quantity)
    assert within(check), check


@pytest.mark.parametrize("check", list(processors()), ids=lambda c: c.model.strip("`"))
def test_the_filters_equal_transformers(check):
    assert within(check), check


def figure(value, digits=1):
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e−{-int(exponent)}"


def table(checks):
    rows = ["| model | " + " | ".join(ALLOWED) + " |", "|---" * 5 + "|"]
    by_model = {}
    for check in checks:
        by_model.setdefault(check.model, []).append(check)
    for name, row in by_model.items():
        cells = [
            ("all equal" if c.seen == 0 else "not equal")
            if c.quantity == "greedy ids"
            else f"{figure(c.seen)} ({figure(c.allowed, 0)})"
            for c in row
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def filters(checks):
    rows = ["| transformers | here | seen | allowed |", "|---|---|---|---|"]
    rows += [f"| {c.model} | {c.quantity} | {figure(c.seen)} | exact |" for c in checks]
    return "\n".join(rows) + "\n"


def without_seen(text):
    """Leave out the differences seen, which belong to a machine."""
    return re.sub(r"\| (0|\d\.\de−\d+)(?= [(|])", "| ·", text)


TOP = """# Equality with transformers

The tests make random Llamas, Gemmas and Phis with transformers 5, save them in shards, load them here, and compare; and they compare the real
SmolLM2-135M-Instruct. This page is written by `tests/test_equality.py`. A test for each cell fails beyond the difference in brackets; the largest
seen when the page was written stands before it. Everything is float32, on a CPU.

- **logits**: the largest difference of any score.
- **loss**: next-token loss with some labels ignored.
- **gradients**: of that loss, for every weight; the largest difference, divided by the largest gradient of the same weight.
- **greedy ids**: {new} new tokens a row, by `generate` on both sides.

## Random checkpoints

No size is a default, no gain is 1, weights are large enough for mistakes to show (logits spread by more than 1). *llama3* has Llama 3's RoPE scaling,
*biases* has biases in attention and feed-forward; both together have them in attention only. Rows without another name are Llamas. In Phi a share
of each head's features turns: half, or 0.4 or 0.7 of 12, rounded down, or all.

"""
REAL = """
## The real model

A text of English, Chinese, digits and an emoji; the ids answer a question.

"""
FILTERS = """
## The filters of the scores

121 rows of 97 scores: many ties, wide ones, rows with excluded tokens, a row of equals. Ours must give the very same numbers.

"""


def test_the_book_has_the_random_models(check_random, llamas, others):
    rows = [check for name in (*llamas, *others) for check in check_random(name)]
    wanted = TOP.format(new=NEW) + table(rows)
    assert without_seen(wanted) in without_seen(PAGE.read_text("utf-8"))


def test_the_book_has_the_filters():
    wanted = FILTERS + filters(processors())
    assert without_seen(wanted) in without_seen(PAGE.read_text("utf-8"))


def test_the_book_has_the_real_model(check_random, llamas, others, real):
    if os.environ.get("WRITE_EQUALITY"):
        rows = [check for name in (*llamas, *others) for check in check_random(name)]
        parts = TOP.format(new=NEW), table(rows), REAL, table(real)
        PAGE.write_text("".join([*parts, FILTERS, filters(processors())]), "utf-8")
    wanted = REAL + table(real)
    assert without_seen(wanted) in without_seen(PAGE.read_text("utf-8"))


def test_a_difference_would_show(make_checkpoint, llamas):
    """One gain off by a tenth, and each quantity but the ids is out of bounds."""
    found = make_checkpoint(**llamas["grouped-untied"], context=128)
    changed = load_model(found.path)
    with torch.no_grad():
        changed.blocks[1].ffn_norm.weight[0] += 0.1
    tokens = torch.randint(0, 97, (3, 40))
    checks = compare("", changed, found.reference, tokens, tokens[:, :7], ALLOWED)
    assert not any(within(check) for check in checks if check.quantity != "greedy ids")
