"""The real model: SmolLM2-135M-Instruct, the same weights here and in transformers."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from annotated_src import attention
from annotated_src.checkpoint import load_model
from annotated_src.generate import generate
from annotated_src.tokenizer import TextTokenizer, render_chat, stream_text

CHATS = [
    [
        ("user", "Why does the moon always show us the same face?"),
        (
            "assistant",
            "Because it turns around its own axis exactly once for each orbit around "
            "the Earth. This is called tidal locking. The pull of the Earth raised two "
            "bulges in the young moon, and as long as it turned faster, the Earth "
            "pulled back on the nearer bulge, until the two motions agreed. Seen from "
            "the sun, the moon does turn, which is why all of it has day and night.",
        ),
        ("user", "So there is no dark side?"),
        (
            "assistant",
            "There is a far side, but it is not dark: it has two weeks of light and "
            "two weeks of night, like the near side. People saw it first in 1959, when "
            "the Soviet probe Luna 3 sent 29 photographs, 17 of them usable.",
        ),
        ("user", "Could the same thing happen to the Earth one day?"),
        (
            "assistant",
            "In principle, yes. The tides slow the Earth down by about 2.3 "
            "milliseconds per century, and the moon recedes by 3.8 centimetres a "
            "year. Left alone for some 50 billion years, both would face each other "
            "forever; but the sun will have swollen into a red giant long before that.",
        ),
        ("user", "Write that as a short note for a child of eight."),
    ],
    [
        ("system", "You are a patient teacher of Python. Answer with code."),
        ("user", "How do I count the words in a file, ignoring case?"),
        (
            "assistant",
            "Use a Counter:\n\n```python\nfrom collections import Counter\nfrom "
            'pathlib import Path\n\ntext = Path("notes.txt").read_text("utf-8")\n'
            "counts = Counter(text.lower().split())\n"
            "for word, count in counts.most_common(10):\n"
            '    print(f"{count:6d} {word}")\n```\n\nHere `split()` cuts at white '
            "space only, so that *word* and *word,* are two different words.",
        ),
        ("user", "And how do I get rid of the commas and full stops?"),
        (
            "assistant",
            "Strip them from both ends of each word:\n\n```python\nimport string\n\n"
            "words = (w.strip(string.punctuation) for w in text.lower().split())\n"
            "counts = Counter(w for w in words if w)\n```\n\nThis keeps the apostrophe "
            "in *don't* and the hyphen in *well-known*, because those are inside.",
        ),
        ("user", "What does the `if w` do in the second line?"),
    ],
]
MESSAGES = [[{"role": r, "content": c} for r, c in chat] for chat in CHATS]
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about a llama.",
    "Count from 95 to 105.",
]
TEXTS = [
    "The year 1984, π = 3.14159, and 007.",
    "  Don't we'll\n\n\ttabs   and   spaces  \n",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}\n",
    "你好，世界！今天是2024年。",
    "a 🦙 and 👩‍👩‍👧 e\u0301 é ﬁ 𝔘",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    return TextTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def hf_tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def model(smollm2_dir):
    return load_model(smollm2_dir)


@pytest.fixture(scope="module")
def reference(smollm2_dir):
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def chats(tokenizer):
    """Two conversations as ids, both longer than 250 tokens."""
    ids = [tokenizer.chat(messages) for messages in MESSAGES]
    assert sum(row.shape[1] for row in ids) >= 500
    return ids


@pytest.mark.parametrize("chat", [0, 1])
def test_teacher_forced_scores_equal_transformers(model, reference, chats, chat):
    found, expected = model(chats[chat]), reference(chats[chat]).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(
        found.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-3
    )


def test_it_has_read_such_text_before(model, chats):
    """Not only equal, but right: few bits a token, where chance is 15.6."""
    logits, ids = model(chats[0])[:, :-1], chats[0][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[0], ids[0])
    assert loss / torch.log(torch.tensor(2.0)) < 4.5


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_equal_transformers(model, reference, tokenizer, question):
    tokens = tokenizer.chat([{"role": "user", "content": question}])
    stop = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    expected = reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=40,
        **stop,
    )
    found = generate(model, tokens, max_new_tokens=40, stop_ids=[tokenizer.eos_id])
    assert found.tolist() == expected.tolist()


def test_greedy_goes_on_as_transformers_does(model, reference, chats):
    expected = reference.generate(
        chats[1],
        attention_mask=torch.ones_like(chats[1]),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, chats[1], max_new_tokens=40), expected)


def test_a_padded_batch_equals_each_question_alone(model, tokenizer):
    rows = [tokenizer.chat([{"role": "user", "content": q}])[0] for q in QUESTIONS]
    width = max(map(len, rows))
    tokens = torch.full((3, width), tokenizer.eos_id)
    is_token = torch.zeros(3, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        is_token[i, width - len(row) :] = True
    together = model(tokens, is_token=is_token)[:, -1]
    alone = torch.cat([model(row[None])[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_attend_and_attend_fused_agree(model, chats, monkeypatch):
    fused = model(chats[1]).log_softmax(-1)
    spelled = staticmethod(attention.attend)
    monkeypatch.setattr(attention.Attention, "attend", spelled)
    spelled_out = model(chats[1]).log_softmax(-1)
    assert not torch.equal(spelled_out, fused)  # it was really the other one
    torch.testing.assert_close(fused, spelled_out, rtol=0, atol=1e-3)


def test_cached_equals_uncached(model, chats):
    tokens = chats[1][:, :60]
    cache = model.new_cache(1, 60)
    parts = [model(part, cache) for part in tokens.split([40, 1, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-3)


def test_bfloat16_is_no_worse_than_in_transformers(smollm2_dir, model, chats):
    ours = load_model(smollm2_dir, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    exact = model(chats[1]).log_softmax(-1)
    errors = [
        (logits.float().log_softmax(-1) - exact).abs().mean()
        for logits in (ours(chats[1]), theirs(chats[1]).logits)
    ]
    assert 0 < errors[0] < 1.1 * errors[1] < 0.2


@pytest.mark.parametrize("messages", [*MESSAGES, MESSAGES[0][:1]])
def test_chats_are_rendered_as_transformers_does(tokenizer, hf_tokenizer, messages):
    expected = hf_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(tokenizer.chat_template, messages) == expected


@pytest.mark.parametrize("text", [*TEXTS, *(c for _, c in CHATS[0] + CHATS[1])])
def test_ids_equal_transformers(tokenizer, hf_tokenizer, text):
    assert tokenizer.encode(text).tolist() == [hf_tokenizer.encode(text)]


def merge_by_hand(word, ranks):
    """Join the pair learned first, again and again: byte-pair encoding, as defined."""
    parts = list(word)
    while pairs := [p for p in pairwise(parts) if p in ranks]:
        first, second = min(pairs, key=ranks.__getitem__)
        at, joined = 0, []
        while at < len(parts):
            both = parts[at : at + 2] == [first, second]
            joined.append(first + second if both else parts[at])
            at += 2 if both else 1
        parts = joined
    return parts


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_ids_equal_byte_pair_encoding_by_hand(smollm2_dir, tokenizer, text):
    """Independent of the tokenizers library, but for the split into words."""
    stored = json.loads((smollm2_dir / "tokenizer.json").read_text("utf-8"))["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(stored["merges"])}
    words = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    by_hand = [part for word, _ in words for part in merge_by_hand(word, ranks)]
    assert tokenizer.encode(text)[0].tolist() == [stored["vocab"][p] for p in by_hand]


def test_digits_are_read_one_by_one(tokenizer):
    ids = tokenizer.encode("2024 1000000")[0]
    parts = [tokenizer.decode(ids[i : i + 1]) for i in range(len(ids))]
    assert parts == ["2", "0", "2", "4", " ", *"1000000"]


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_text_comes_back_and_streams(tokenizer, text):
    ids = tokenizer.encode(text)[0]
    assert tokenizer.decode(ids) == text
    pieces = list(stream_text(tokenizer, ids.tolist()))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_it_answers_on_the_command_line(smollm2_dir):
    command = [sys.executable, "-m", "annotated_src.generate", QUESTIONS[0]]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted = (0, "The capital of France is Paris.\n", "")
    assert (run.returncode, run.stdout, run.stderr) == wanted


def test_the_directory_is_what_its_name_says(model, tokenizer):
    c = model.config
    assert (c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads) == (30, 576, 9, 3)
    assert (c.vocab_size, c.rope_base, c.tied_head) == (49152, 100_000.0, True)
    assert tokenizer.encode("<|im_start|>user").tolist() == [[1, 4093]]
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
