"""What `python -m annotated_src.generate` says, does, and refuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from annotated_src import command_line as module
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.command_line import main
from annotated_src.fast import speed_up
from annotated_src.generate import generate
from annotated_src.gguf_to_hf import convert_gguf
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.pipeline import TextGeneration
from annotated_src.sampler import Sample
from annotated_src.tokenizer import TextTokenizer

PROGRAM = "python -m annotated_src.generate"
COMMAND = [sys.executable, "-m", "annotated_src.generate"]


@pytest.fixture(scope="module")
def folder(make_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "small"
    convert_gguf(make_gguf().path, path, lambda line: None)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run main with these arguments; return what it wrote to stdout."""

    def run(*arguments, said=None):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        if said is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        main()
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run main where it ends with an error; return its status and its one line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert out == ""
        return caught.value.code, err

    return run


def asked(*said, system=None):
    """A conversation; said are the user's and the assistant's words by turns."""
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def answer(folder, prompt, steps, dtype=torch.float32, **sampling):
    """What the pipeline answers; with sampling, a Sample drawn with its seed."""
    seed = sampling.pop("seed", None)
    if seed is not None:
        sampling["generator"] = torch.Generator().manual_seed(seed)
    options = {"sampler": Sample(**sampling)} if sampling else {}
    pipeline = TextGeneration.from_pretrained(folder, dtype)
    return pipeline(prompt, max_new_tokens=steps, **options)


def test_it_prints_the_answer(folder, run):
    out = run(folder, "for what?", "--max-new-tokens", "20")
    assert out == answer(folder, asked("for what?"), 20) + "\n"
    assert len(out) > 5


def test_it_stops_at_the_end_token(copy, run):
    """Let the fourth token of the answer be the one that ends it."""
    tokenizer = TextTokenizer.from_pretrained(copy)
    tokens = tokenizer.chat(asked("for what?"))
    ids = generate(load_model(copy), tokens, max_new_tokens=20)
    new = ids[0, tokens.shape[1] :].tolist()
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["eos_token"] = tokenizer.tokenizer.id_to_token(new[3])
    path.write_text(json.dumps(config), "utf-8")
    expected = tokenizer.decode(new[: new.index(new[3])])
    assert run(copy, "for what?", "--max-new-tokens", "20") == expected + "\n"


def test_it_takes_the_real_model_by_default(folder, run, monkeypatch):
    monkeypatch.setattr(module, "smollm2", lambda: folder)
    expected = answer(folder, asked("for what?"), 3) + "\n"
    assert run("for what?", "--max-new-tokens", "3") == expected
    assert run("--max-new-tokens", "3", "for what?") == expected


def test_each_piece_is_flushed_before_the_next_is_made(folder, monkeypatch):
    events = []
    out = SimpleNamespace(
        write=lambda text: events.append(text), flush=lambda: events.append(None)
    )
    monkeypatch.setattr(sys, "stdout", out)
    steps = ["--max-new-tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["generate", str(folder), "for what?", *steps])
    main()
    assert events.count(None) > 2
    assert all(events[i + 1] is None for i in range(0, len(events) - 1, 2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.6),
        ("top_k", 5),
        ("top_p", 0.5),
        ("min_p", 0.2),
        ("repetition_penalty", 4.0),
    ],
)
def test_each_option_of_sampling_arrives(folder, run, option, value):
    words = [f"--{option.replace('_', '-')}", value, "--seed", 3]
    out = run(folder, "for what?", "--max-new-tokens", 30, *words)
    drawn = answer(folder, asked("for what?"), 30, **{option: value, "seed": 3})
    without = answer(folder, asked("for what?"), 30, seed=3)
    assert out == drawn + "\n"
    assert drawn != without


def test_all_options_of_sampling_together(folder, run):
    values = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02}
    values |= {"repetition_penalty": 1.2, "seed": 7}
    words = [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    out = run(folder, "for what?", "--max-new-tokens", 30, *words)
    assert out == answer(folder, asked("for what?"), 30, **values) + "\n"


def test_a_seed_repeats_an_answer_and_another_gives_another(folder, run):
    def drawn(*words):
        return run(folder, "for what?", "--max-new-tokens", 20, *words)

    assert drawn("--seed", 1) == drawn("--seed", 1)
    assert len({drawn("--seed", seed) for seed in range(4)}) == 4
    unseeded = {drawn("--temperature", 1.0) for _ in range(4)}
    assert len(unseeded) == 4


def test_without_sampling_there_is_no_chance(folder, run):
    outs = {run(folder, "for what?", "--max-new-tokens", 20) for _ in range(3)}
    assert len(outs) == 1


def test_raw_continues_the_prompt_as_it_stands(folder, run):
    out = run(folder, "for what?", "--raw", "--max-new-tokens", 20)
    assert out == answer(folder, "for what?", 20) + "\n"
    assert out != run(folder, "for what?", "--max-new-tokens", 20)


def test_options_may_stand_between_path_and_prompt(folder, run):
    out = run(folder, "--raw", "--max-new-tokens", 20, "for what?")
    assert out == answer(folder, "for what?", 20) + "\n"


def test_a_system_message_comes_first(folder, run):
    out = run(folder, "for what?", "--system", "be short", "--max-new-tokens", 20)
    assert out == answer(folder, asked("for what?", system="be short"), 20) + "\n"
    assert out != run(folder, "for what?", "--max-new-tokens", 20)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_arrives(folder, run, monkeypatch, name):
    dtypes = []

    def show(pieces):
        (answer,) = loaded
        dtypes.append(answer.model.embedding.weight.dtype)
        return "".join(pieces)

    loaded = []
    load = TextGeneration.from_pretrained

    def remember(*args):
        loaded.append(load(*args))
        return loaded[0]

    monkeypatch.setattr(TextGeneration, "from_pretrained", remember)
    monkeypatch.setattr(module, "show", show)
    run(folder, "for what?", "--dtype", name, "--max-new-tokens", 3)
    assert dtypes == [getattr(torch, name)]


STEPS = ("--max-new-tokens", 12)


def test_a_chat_remembers_what_was_said(folder, run):
    first = answer(folder, asked("for what?"), 12)
    second = answer(folder, asked("for what?", first, "and then?"), 12)
    out = run(folder, "--chat", *STEPS, said="for what?\nand then?\n")
    assert out == f"{first}\n{second}\n"
    other = answer(folder, asked("in a loop", "yes", "and then?"), 12)
    assert second not in (other, answer(folder, asked("and then?"), 12))


def test_a_chat_with_the_default_model_system_message_and_blank_lines(
    folder, run, monkeypatch
):
    monkeypatch.setattr(module, "smollm2", lambda: folder)
    first = answer(folder, asked("for what?", system="be short"), 12)
    second = answer(
        folder, asked("for what?", first, "and then?", system="be short"), 12
    )
    said = "\n  for what?  \n\n   \nand then?"
    out = run("--chat", "--system", "be short", *STEPS, said=said)
    assert out == f"{first}\n{second}\n"


def test_clear_forgets_all_but_the_system_message(folder, run):
    first = answer(folder, asked("for what?", system="be short"), 12)
    fresh = answer(folder, asked("and then?", system="be short"), 12)
    said = "for what?\n/clear\nand then?\n"
    out = run(folder, "--chat", "--system", "be short", *STEPS, said=said)
    assert out == f"{first}\n{fresh}\n"


def test_a_chat_ends_with_the_input(folder, run):
    assert run(folder, "--chat", said="") == ""
    assert run(folder, "--chat", said="\n \n") == ""


def test_a_turn_too_long_is_refused_and_forgotten(folder, monkeypatch, capsys):
    first = answer(folder, asked("for what?"), 12)
    second = answer(folder, asked("for what?", first, "and then?"), 12)
    said = f"for what?\n{'a' * 300}\nand then?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    steps = map(str, STEPS)
    monkeypatch.setattr(sys, "argv", ["generate", str(folder), "--chat", *steps])
    main()
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n"
    assert "must be 0 to 256 tokens (max_seq_len)\n/clear starts afresh\n" in err


def test_a_person_sees_where_to_write(folder, monkeypatch, capsys):
    said = io.StringIO("for what?\n")
    said.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", said)
    arguments = ["generate", str(folder), "--chat", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert capsys.readouterr().err == "> > "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "999"], r"must be 0 to 256 tokens"),
        (["--max-new-tokens", "-1"], "max_new_tokens -1"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0; for 0, use"),
        (["--temperature", "-1"], "temperature must be above 0, got -1.0"),
        (["--temperature", "nan"], "temperature must be above 0, got nan"),
        (["--top-p", "2"], "got 2.0"),
        (["--top-p", "0"], "got 0.0"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--min-p", "1.5"], "got 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0, got 0.0"),
        (["--device", "abacus"], "abacus"),
        (["--device", "abacus", "--seed", "1"], "abacus"),
        (["--raw", ""], "the prompt '' has no tokens"),
    ],
)
def test_an_error_is_one_line_and_status_1(folder, refused, words, message):
    prompt = [] if words[-1] == "" else ["hi"]
    status, err = refused(folder, *prompt, *words)
    assert status == 1
    assert message in err
    assert err.startswith(f"{PROGRAM}: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without")
@pytest.mark.parametrize("words", [[], ["--seed", "1"]])
def test_a_device_that_is_not_here(folder, refused, words):
    status, err = refused(folder, "hi", "--device", "cuda", *words)
    assert (status, err.count("\n")) == (1, 1)
    assert "CUDA" in err


def test_a_path_that_is_not_there(refused):
    status, err = refused("/nowhere/at/all", "hi")
    wanted = "no tokenizer.json and no ice_text.model in /nowhere/at/all"
    assert (status, err) == (1, f"{PROGRAM}: {wanted}\n")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json"]
)
def test_a_damaged_file_is_named(copy, refused, name):
    (copy / name).write_text("{", "utf-8")
    status, err = refused(copy, "hi")
    assert (status, err.count("\n")) == (1, 1)
    assert name in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a PROMPT, or --chat"),
        (["a", "b", "c"], "expected [PATH] PROMPT, or --chat [PATH]"),
        (["--chat", "a", "b"], "expected [PATH] PROMPT, or --chat [PATH]"),
        (["hi", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["hi", "--max-new-tokens", "2.5"], "invalid int value: '2.5'"),
        (["hi", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["hi", "--loud"], "unrecognized arguments: --loud"),
    ],
)
def test_a_mistake_in_the_command_is_status_2(refused, words, message):
    status, err = refused(*words)
    assert status == 2
    assert message in err
    assert err.startswith("usage: ")


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for action in module.make_parser()._actions:
        assert all(name in out for name in action.option_strings)
    assert out.startswith(f"usage: {PROGRAM} [options] [PATH] PROMPT, or --chat")


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
def test_it_answers_with_chatglm(chatglm, run, prompt):
    """Where the text has a [MASK] of its own, the tokenizer's positions count."""
    model, tokenizer = load_model(chatglm), ChatGLMTokenizer.from_pretrained(chatglm)
    tokens, positions, mask = tokenizer.pad([tokenizer.encode(prompt)])
    ids = generate(
        model,
        tokens,
        max_new_tokens=12,
        stop_ids=[tokenizer.eos_id],
        positions=positions,
        mask=mask,
    )
    expected = tokenizer.decode(ids[0, tokens.shape[1] :])
    assert len(expected) > 3
    assert run(chatglm, prompt, "--max-new-tokens", "12") == expected + "\n"


def start(*arguments):
    """Start the command as a process of its own, without its buffers' help."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


@pytest.fixture
def endless(copy):
    """A model with so much context that its answer takes long."""
    path = copy / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["max_position_embeddings"] = 100_000
    path.write_text(json.dumps(config), "utf-8")
    end = {"eos_token_id": 10**6}  # never said
    (copy / "generation_config.json").write_text(json.dumps(end), "utf-8")
    return copy, "for what?", "--max-new-tokens", 90_000


def test_ctrl_c_in_the_middle_of_an_answer_ends_it_quietly(endless):
    with start(*endless) as process:
        said = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert len(said) == 10
    assert (process.returncode, err.decode()) == (130, "\n")
    assert len(rest) < 50_000


@pytest.mark.parametrize("words", [[], ["--chat"]])
def test_a_reader_that_leaves_ends_it_quietly(endless, words):
    """As `| head -1` does once it has its line."""
    folder, prompt, *limit = endless
    with start(folder, *(words or [prompt]), *limit) as process:
        if words:
            process.stdin.write(b"for what?\n")
            process.stdin.flush()
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        process.wait(timeout=60)
        err = process.stderr.read().decode()
    assert (process.returncode, err) == (1, "")


def test_it_runs_as_a_command(folder):
    with start(folder, "for what?", "--max-new-tokens", 5) as process:
        out, err = process.communicate(timeout=60)
    expected = answer(folder, asked("for what?"), 5) + "\n"
    assert (process.returncode, out.decode(), err.decode()) == (0, expected, "")


def test_fast_answers_with_eight_bits(folder, run, monkeypatch):
    made = []

    def remember(model):
        made.append(speed_up(model))
        return made[0]

    monkeypatch.setattr(module, "speed_up", remember)
    out = run(folder, "for what?", "--fast", "--max-new-tokens", 20)
    pipeline = TextGeneration.from_pretrained(folder)
    pipeline.model = made[0]
    assert out == pipeline(asked("for what?"), max_new_tokens=20) + "\n"


def test_fast_refuses_what_it_cannot_speed_up(folder, run, capsys):
    with pytest.raises(SystemExit) as caught:
        run(folder, "hi", "--fast", "--dtype", "bfloat16")
    assert caught.value.code == 1
    assert "the fast path is made of float32" in capsys.readouterr().err
