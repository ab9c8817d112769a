import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from annotated_src import generate as module
from annotated_src.beam_search import beam_search
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.generate import generate, generate_stream, main
from annotated_src.gguf_to_hf import convert_gguf
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.tokenizer import TextTokenizer


class Counting:
    """A model that says: after n comes n + 1, and after 9 comes 0."""

    config = SimpleNamespace(max_seq_len=12)

    def __init__(self):
        self.calls = []

    def new_cache(self, batch_size, max_seq_len):
        return [SimpleNamespace(size=(batch_size, max_seq_len), length=0)]

    def __call__(self, tokens, cache):
        self.calls.append(tokens.tolist())
        return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float()


def count_on(prompt, steps, **options):
    tokens = torch.tensor(prompt)
    return generate(Counting(), tokens, max_new_tokens=steps, **options).tolist()


def test_greedy_ids_equal_transformers(checkpoint):
    tokens = torch.randint(0, 97, (3, 7))
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate(checkpoint.model, tokens, max_new_tokens=30)
    assert found.tolist() == expected.tolist()


def test_stopped_rows_equal_transformers(checkpoint):
    """transformers pads a row that has ended; told to, with the stop id."""
    tokens = torch.randint(0, 97, (3, 7))
    free = generate(checkpoint.model, tokens, max_new_tokens=20)
    stop = int(free[1, 12])  # the second row draws it, at the sixth step or before
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    found = generate(checkpoint.model, tokens, max_new_tokens=20, stop_ids=[stop])
    assert found.tolist() == expected.tolist()


def test_without_a_cache_it_is_the_same(make_checkpoint):
    model, tokens = make_checkpoint().model, torch.randint(0, 97, (2, 5))
    expected = tokens
    for _ in range(20):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, tokens, max_new_tokens=20), expected)


def test_the_prompt_is_read_once_and_then_one_token_at_a_time():
    model = Counting()
    generate(model, torch.tensor([[4, 5], [6, 6]]), max_new_tokens=3)
    assert model.calls == [[[4, 5], [6, 6]], [[6], [7]], [[7], [8]]]


def test_a_stopped_row_repeats_its_stop_id_and_the_others_go_on():
    found = count_on([[0], [4], [6]], 8, stop_ids=[2, 7])
    assert found == [[0, 1, 2, 2], [4, 5, 6, 7], [6, 7, 7, 7]]


def test_it_ends_with_the_last_row():
    assert count_on([[0], [1]], 8, stop_ids={2}) == [[0, 1, 2], [1, 2, 2]]
    assert count_on([[0]], 3, stop_ids={9}) == [[0, 1, 2, 3]]


def test_a_stop_id_in_the_prompt_stops_nothing():
    assert count_on([[2]], 3, stop_ids=[2]) == [[2, 3, 4, 5]]


def test_nothing_asked_nothing_added():
    assert count_on([[3, 4]], 0) == [[3, 4]]


def test_another_sampler():
    found = count_on([[3]], 2, sampler=lambda logits: logits.argmin(dim=-1))
    assert found == [[3, 0, 0]]


def test_streaming_gives_the_same_columns_one_at_a_time():
    model, prompt = Counting(), torch.tensor([[0], [5]])
    stream = generate_stream(model, prompt, max_new_tokens=4, stop_ids=[7])
    assert next(stream).tolist() == [1, 6]
    assert len(model.calls) == 1  # the second column is not computed yet
    columns = [[1, 6], *(column.tolist() for column in stream)]
    whole = count_on([[0], [5]], 4, stop_ids=[7])
    assert [list(row) for row in zip(*columns, strict=True)] == [r[1:] for r in whole]


def test_no_gradients_are_kept_and_the_callers_mode_is_left_alone(make_checkpoint):
    # inference_mode does not see a generator through the check of signatures, so the
    # file is read once more, past the hook that adds the check.
    spec = importlib.util.spec_from_file_location("plain", module.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    model, tokens, seen = make_checkpoint().model, torch.tensor([[1, 2]]), []

    def sampler(logits):
        seen.append(logits.requires_grad)
        return logits.argmax(dim=-1)

    for _ in plain.generate_stream(model, tokens, max_new_tokens=2, sampler=sampler):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert seen == [False, False]


@pytest.mark.parametrize("function", [generate, generate_stream])
@pytest.mark.parametrize(
    ("length", "steps", "message"),
    [
        (0, 3, "the prompt has no tokens"),
        (3, -1, r"prompt 3 \+ max_new_tokens -1 must be 0 to 12"),
        (3, 10, r"prompt 3 \+ max_new_tokens 10 must be 0 to 12 tokens"),
        (13, 0, r"prompt 13 \+ max_new_tokens 0 must be 0 to 12 tokens"),
    ],
)
def test_bad_lengths_are_refused_before_the_first_step(
    function, length, steps, message
):
    tokens = torch.zeros(1, length, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        function(Counting(), tokens, max_new_tokens=steps)


def test_all_the_room_may_be_used(make_checkpoint):
    tokens = torch.randint(0, 97, (1, 60))
    found = generate(make_checkpoint().model, tokens, max_new_tokens=4)
    assert found.shape == (1, 64)


def test_an_id_outside_the_vocabulary(make_checkpoint):
    with pytest.raises(
        ValueError, match="token ids must be 0 to 96, got ids from 3 to 97"
    ):
        generate(make_checkpoint().model, torch.tensor([[3, 97]]), max_new_tokens=1)


@pytest.mark.usefixtures("unchecked")
def test_a_prompt_must_be_rows(make_checkpoint):
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(2,\)"):
        generate(make_checkpoint().model, torch.tensor([3, 4]), max_new_tokens=1)


@pytest.fixture
def folder(make_gguf, tmp_path):
    convert_gguf(make_gguf().path, tmp_path / "small", lambda line: None)
    return tmp_path / "small"


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    main()


def answer(folder, prompt, steps):
    model, tokenizer = load_model(folder), TextTokenizer.from_pretrained(folder)
    tokens = tokenizer.chat([{"role": "user", "content": prompt}])
    stops = [tokenizer.eos_id]
    ids = generate(model, tokens, max_new_tokens=steps, stop_ids=stops)
    return tokenizer.decode(ids[0, tokens.shape[1] :])


def test_main_prints_the_answer(folder, monkeypatch, capsys):
    run_main(monkeypatch, folder, "for what?", "--max-new-tokens", "20")
    out, err = capsys.readouterr()
    assert out == answer(folder, "for what?", 20) + "\n"
    assert len(out) > 5
    assert err == ""


def test_main_stops_at_the_end_token(folder, monkeypatch, capsys):
    """Let the fourth token of the answer be the one that ends it."""
    tokenizer = TextTokenizer.from_pretrained(folder)
    tokens = tokenizer.chat([{"role": "user", "content": "for what?"}])
    ids = generate(load_model(folder), tokens, max_new_tokens=20)
    new = ids[0, tokens.shape[1] :].tolist()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["eos_token"] = tokenizer.tokenizer.id_to_token(new[3])
    path.write_text(json.dumps(config), "utf-8")
    run_main(monkeypatch, folder, "for what?", "--max-new-tokens", "20")
    expected = tokenizer.decode(new[: new.index(new[3]) + 1])
    assert capsys.readouterr().out == expected + "\n"


def test_main_takes_the_real_model_by_default(folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "smollm2", lambda: folder)
    run_main(monkeypatch, "for what?", "--max-new-tokens", "3")
    assert capsys.readouterr().out == answer(folder, "for what?", 3) + "\n"


def test_main_streams(folder, monkeypatch):
    """Each piece is flushed before the next is made."""
    events = []
    out = SimpleNamespace(
        write=lambda text: events.append(text), flush=lambda: events.append(None)
    )
    monkeypatch.setattr(sys, "stdout", out)
    run_main(monkeypatch, folder, "for what?", "--max-new-tokens", "5")
    assert events.count(None) > 2
    assert all(events[i + 1] is None for i in range(0, len(events) - 1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all", "hi"], "no config.json in /nowhere/at/all"),
        (["{folder}", "hi", "--max-new-tokens", "999"], "must be 0 to 256 tokens"),
        (["{folder}", "hi", "--max-new-tokens", "-1"], "max_new_tokens -1"),
    ],
)
def test_main_says_what_is_wrong(folder, monkeypatch, capsys, arguments, message):
    arguments = [a.format(folder=folder) for a in arguments]
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 1
    assert message in err
    assert out == ""
    assert err.startswith("python -m annotated_src.generate: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_main_on_a_damaged_tokenizer(folder, monkeypatch, capsys, name):
    (folder / name).write_text("{", "utf-8")
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, folder, "hi")
    assert caught.value.code == 1
    assert name in capsys.readouterr().err


@pytest.fixture
def chatglm(tmp_path):
    """A random ChatGLM over the toy tokenizer, in the original's files."""
    golden = Path(__file__).parent / "golden" / "chatglm6b"
    shutil.copy(golden / "toy_ice_text.model", tmp_path / "ice_text.model")
    record = json.loads((golden / "tokenizer.json").read_text("utf-8"))
    names = record["tokenizer_config_of_6b"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    config = {
        "model_type": "chatglm",
        "vocab_size": record["vocab_size"],
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "inner_hidden_size": 40,
        "max_sequence_length": 60,
        "layernorm_epsilon": 1e-5,
        "bos_token_id": 8,
        "eos_token_id": 9,
        "mask_token_id": 4,
        "gmask_token_id": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    model = ChatGLM(ChatGLMConfig.from_hf(config))
    names, weights = names_by_layer(model, HF_NAMES), model.state_dict()
    stored = {theirs: weights[ours] * 5 for theirs, ours in names.items()}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("prompt", ["你好", "the quick [MASK] fox"])
def test_main_answers_with_chatglm(chatglm, monkeypatch, capsys, prompt):
    """Where the text has a [MASK] of its own, the tokenizer's positions count."""
    run_main(monkeypatch, chatglm, prompt, "--max-new-tokens", "12")
    model, tokenizer = load_model(chatglm), ChatGLMTokenizer.from_pretrained(chatglm)
    tokens, positions, mask = tokenizer.pad([tokenizer.encode(prompt)])
    stops = [tokenizer.eos_id]
    ids = generate(
        model,
        tokens,
        max_new_tokens=12,
        stop_ids=stops,
        positions=positions,
        mask=mask,
    )
    expected = tokenizer.decode(ids[0, tokens.shape[1] :])
    assert len(expected) > 3
    assert capsys.readouterr().out == expected + "\n"


def test_it_runs_as_a_command():
    command = [sys.executable, "-m", "annotated_src.generate", "/nowhere", "hi"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    wanted = "python -m annotated_src.generate: no config.json in /nowhere\n"
    assert run.stderr == wanted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_equal_transformers(make_checkpoint, num_beams, seed):
    """Without a length penalty; with one, transformers 5 leaves the prompt out."""
    checkpoint = make_checkpoint()
    torch.manual_seed(seed)
    tokens = torch.randint(0, 97, (1, 5))
    stops = torch.randperm(97)[:12].tolist()  # so that beams end early and late
    expected = checkpoint.reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=8,
        eos_token_id=stops,
        pad_token_id=0,
        length_penalty=0.0,
    )
    found = beam_search(
        checkpoint.model,
        tokens,
        num_beams=num_beams,
        max_new_tokens=8,
        stop_ids=stops,
        length_penalty=0.0,
    )
    assert found.tolist() == expected.tolist()
