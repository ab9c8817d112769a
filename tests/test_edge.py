"""What was exported, on the device's side: equal to torch, and without torch."""

import os
import subprocess
import sys
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from annotated_src.checkpoint import lay_by_columns, load_model
from annotated_src.convert import convert, quantize_file
from annotated_src.edge import EdgeRunner, edge_generate
from annotated_src.edge_model import EdgeModel, write_tokens
from annotated_src.export import export_tflite
from annotated_src.generate import generate
from annotated_src.grading import grade
from annotated_src.models import gemma, llama, phi
from annotated_src.tflite_file import open_tflite, operators, stored_bytes

KINDS = {
    "llama": (llama, llama.Llama),
    "gemma": (gemma, gemma.Gemma),
    "phi": (phi, phi.Phi),
}
PREFILL, CACHE = 16, 128
# A process that has neither torch nor jaxtyping, nor what comes with litert_torch.
WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ImportError(f"{{name}} is hidden")
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module", params=KINDS)
def exported(converter, request, tmp_path_factory):
    """A small model with large weights, and what was exported of it."""
    module, kind = KINDS[request.param]
    # litert quantizes matrices of 1024 numbers and more; int4 goes by groups of 32.
    sizes = {"embed_dim": 64, "head_dim": 16, "ffn_dim": 96}
    model = kind(replace(module.tiny_config(), **sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.uniform_(weight, 0.5, 1.5)
                weight.data -= int(isinstance(model, gemma.Gemma))  # gain 1 + weight
            else:
                nn.init.normal_(weight, std=0.25)
    lay_by_columns(model)  # as `load_model` leaves it
    model.eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("edge") / f"{request.param}.tflite"
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        export_tflite(model, path, PREFILL, CACHE)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return model, path


@pytest.fixture(scope="module")
def text():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return torch.randint(0, 96, (CACHE,))


@pytest.mark.parametrize("prompt_len", [1, 2, 9, PREFILL])
def test_each_step_equals_torch(exported, text, prompt_len):
    model, path = exported
    scores = EdgeRunner(path).logits(text.tolist(), prompt_len)
    assert scores.shape == (CACHE - prompt_len + 1, 96)
    assert scores.dtype == np.float32
    ours = model(text[None])[0, prompt_len - 1 :]
    torch.testing.assert_close(torch.from_numpy(scores), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_text_is_that_of_generate(exported, text, threads):
    model, path = exported
    prompt = text[:9]
    ids = generate(model, prompt[None], max_new_tokens=CACHE - 9)[0, 9:]
    assert (
        edge_generate(path, prompt.tolist(), CACHE - 9, threads=threads) == ids.tolist()
    )


@pytest.mark.usefixtures("converter", "unchecked")
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_loaded_is_exported_right(make_checkpoint, tmp_path, tied):
    """Its weights lie by columns, which litert, left alone, takes for each other."""
    model, path = load_model(make_checkpoint(tied=tied).path), tmp_path / "loaded"
    assert not model.blocks[0].ffn.up_proj.weight.is_contiguous()
    export_tflite(model, path, 8, 32)
    tokens = torch.randint(0, 97, (32,))
    scores = torch.from_numpy(EdgeRunner(path).logits(tokens.tolist(), 8))
    ours = model(tokens[None])[0, 7:]
    torch.testing.assert_close(scores, ours, atol=1e-4, rtol=0)


def test_it_stops_at_a_stop_id_and_says_it(exported, text):
    _, path = exported
    ids = edge_generate(path, text[:5].tolist(), 20)
    stop = ids[7]
    until = ids.index(stop) + 1
    assert edge_generate(path, text[:5].tolist(), 20, stop_ids={stop}) == ids[:until]


def test_a_text_does_not_remember_the_one_before(exported, text):
    runner = EdgeRunner(exported[1])
    fresh = runner.logits(text[:12].tolist(), 4)
    runner.logits(text.flip(0).tolist(), PREFILL)
    np.testing.assert_array_equal(runner.logits(text[:12].tolist(), 4), fresh)
    runner.reset()
    assert runner.length == 0
    np.testing.assert_array_equal(
        runner.step(int(text[0])), runner.read([int(text[0])])
    )


def test_prefill_and_step_by_hand(exported, text):
    runner = EdgeRunner(exported[1])
    assert (runner.prefill_len, runner.cache_len) == (PREFILL, CACHE)
    assert runner.vocab_size == 96
    runner.prefill(text[:PREFILL].tolist())
    assert runner.length == PREFILL
    scores = runner.step(int(text[PREFILL]))
    ours = exported[0](text[None, : PREFILL + 1])[0, -1]
    torch.testing.assert_close(torch.from_numpy(scores), ours, atol=1e-4, rtol=0)


def test_the_file_has_each_weight_once_and_no_key_is_repeated(exported):
    model, path = exported
    weights = sum(weight.nbytes for weight in model.parameters())
    tables = 2 * EdgeModel(model, CACHE).cos.nbytes
    assert 0 <= stored_bytes(path)["FLOAT32"] - weights - tables < 1000
    layers = model.config.num_layers
    for name, steps in operators(path).items():
        assert "BROADCAST_TO" not in steps
        assert "STABLEHLO_SCATTER" not in steps
        assert steps.count("DYNAMIC_UPDATE_SLICE") == 2 * layers
        assert steps.count("SOFTMAX") == layers - (name == "prefill")


@pytest.mark.parametrize(
    ("scheme", "kind", "share", "agree", "far"),
    [
        ("int8", "INT8", 0.25, 0.82, 0.03),
        ("int8-weight-only", "INT8", 0.25, 0.85, 0.02),
        ("fp16", "FLOAT16", 0.5, 0.98, 1e-4),
        # Random weights have many near-ties; chance would be 1 in 96.
        ("int4", "INT4", 0.125, 0.2, 2.0),
    ],
)
def test_fewer_bits(exported, text, tmp_path, scheme, kind, share, agree, far):
    model, path = exported
    target = tmp_path / "small.tflite"
    quantize_file(path, target, scheme)
    matrices = sum(w.nbytes for w in model.parameters() if w.ndim == 2)
    assert stored_bytes(target)[kind] == matrices * share
    scores = torch.from_numpy(EdgeRunner(target).logits(text.tolist()))
    ours = model(text[None])[0]
    assert not torch.allclose(scores, ours, atol=1e-4)
    grades = grade(ours[None], scores[None])
    assert grades.agreement >= agree
    assert grades.mean_kl <= far


def test_some_weights_only(exported, tmp_path):
    _, path = exported
    target = tmp_path / "small.tflite"
    quantize_file(path, target, "int8", match="ffn")
    every = tmp_path / "all.tflite"
    quantize_file(path, every, "int8")
    assert 0 < stored_bytes(target)["INT8"] < stored_bytes(every)["INT8"]
    small = target.read_bytes()
    with pytest.raises(
        ValueError, match=r"no weight: .* 'nothing'; names are like '.*proj"
    ):
        quantize_file(path, target, "int8", match="nothing")
    with pytest.raises(ValueError, match="int8 changed no weight"):
        quantize_file(every, target, "int8")  # once more
    assert target.read_bytes() == small
    assert len(list(tmp_path.iterdir())) == 2


def without(*hidden):
    return [sys.executable, "-c", WITHOUT_TORCH.format(hidden=hidden)]


def run_code(code, *arguments, hidden=("torch", "jaxtyping", "litert_torch", "jax")):
    program, option, hide = without(*hidden)
    return subprocess.run(
        [program, option, hide + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )


GENERATE = """
from annotated_src.edge import edge_generate
print(edge_generate(sys.argv[1], [1, 2, 3], 12))
assert not {"torch", "jaxtyping"} & set(sys.modules)
"""


def test_it_runs_where_torch_cannot_be_imported(exported):
    done = run_code(GENERATE, exported[1])
    assert done.stderr == ""
    assert done.stdout == f"{edge_generate(exported[1], [1, 2, 3], 12)}\n"
    assert run_code("import torch").returncode  # it is really hidden


def test_the_command_runs_where_torch_cannot_be_imported(exported):
    run_main = "import runpy; runpy.run_module('annotated_src.edge', None, '__main__')"
    asked = (exported[1], "--tokens", "1,2,3", "--max-new-tokens", 5)
    done = run_code(run_main, *asked)
    ids = edge_generate(exported[1], [1, 2, 3], 5)
    assert (done.stdout, done.stderr) == (",".join(map(str, ids)) + "\n", "")
    for wrong, status, said in (
        ("1,x", 2, "error: --tokens must be like 1,2,3, got '1,x'"),
        ("96", 1, "ids must be 0 to 95"),
    ):
        done = run_code(run_main, exported[1], "--tokens", wrong)
        assert done.returncode == status
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"python -m annotated_src.edge: {said}")
        assert "Traceback" not in done.stderr


def test_a_missing_reader_is_named(exported):
    done = run_code(GENERATE, exported[1], hidden=("ai_edge_litert",))
    last = done.stderr.strip().splitlines()[-1]
    assert "a .tflite file needs ai-edge-litert: pip install ai-edge-litert" in last


@pytest.mark.parametrize(
    ("tokens", "new", "said"),
    [
        ([], 5, "an empty prompt"),
        ([0] * (PREFILL + 1), 5, "a prompt of 17 tokens, exported for 16"),
        ([0] * PREFILL, 114, "16 tokens and 114 more need a cache of 129, .* with 128"),
        ([1, 96], 5, "ids must be 0 to 95, got ids from 1 to 96"),
        ([-1, 9], 5, "ids must be 0 to 95, got ids from -1 to 9"),
        ([[1, 2]], 5, r"a row of whole numbers, got int64 of shape \(1, 2\)"),
        ([1.5], 5, "a row of whole numbers, got float64"),
        ([1], 0, "max_new_tokens must be 1 or more, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_continued_is_refused(exported, tokens, new, said):
    with pytest.raises(ValueError, match=said):
        edge_generate(exported[1], tokens, new)


def test_the_whole_cache_can_be_used_and_no_more(exported, text):
    _, path = exported
    prompt = text[:PREFILL].tolist()
    assert len(edge_generate(path, prompt, CACHE - PREFILL + 1)) == 113
    runner = EdgeRunner(path)
    runner.logits(text.tolist())
    with pytest.raises(ValueError, match="the cache is full: 128 tokens"):
        runner.step(1)
    with pytest.raises(ValueError, match=r"prompt_len must be 1 to 3, .* got 4"):
        runner.logits([1, 2, 3], 4)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        EdgeRunner(path, threads=0)


TRUNCATE = """
from annotated_src.edge import EdgeRunner
from pathlib import Path
data, part = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
whole = len(data)
for length in [*range(70), *range(70, whole - 70, 997), *range(whole - 70, whole)]:
    part.write_bytes(data[:length])
    try:
        EdgeRunner(part)
    except ValueError as error:
        assert "is not a whole .tflite file" in str(error), error
    else:
        print(length)
print("survived")
"""


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_truncated_file_is_refused(exported, tmp_path, scheme):
    path = exported[1]
    if scheme:
        path = tmp_path / "whole"
        quantize_file(exported[1], path, scheme)
    done = run_code(TRUNCATE, path, tmp_path / "part.tflite")
    assert (done.stdout, done.returncode) == ("survived\n", 0), done.stderr


def test_what_is_no_export_of_ours_is_refused(converter, tmp_path):
    path = tmp_path / "other.tflite"
    with pytest.raises(FileNotFoundError, match=r"no file .*other"):
        EdgeRunner(path)
    path.write_bytes(b"PK\3\4" + bytes(500))
    with pytest.raises(ValueError, match=r"is not a whole \.tflite file"):
        EdgeRunner(path)
    for look in (stored_bytes, operators):
        with pytest.raises(ValueError, match=r"is not a whole \.tflite file: it lacks"):
            look(path)
        path.write_bytes(b"\x20\0\0\0TFL3" + bytes(range(200)))
        with pytest.raises(ValueError, match=r"is not a whole \.tflite file"):
            look(path)
        path.write_bytes(b"PK\3\4" + bytes(500))


class Writes(nn.Module):
    def forward(self, stored, new, start):
        return {"stored": write_tokens(stored, new, start)}


@pytest.mark.usefixtures("converter", "unchecked")
def test_a_device_moves_a_write_back_until_it_fits(tmp_path):
    """Torch refuses it; so the runner must."""
    path, starts = tmp_path / "write.tflite", (0, 2, 4, 5, 9, -1)
    sample = {"stored": torch.zeros(1, 1, 7, 1), "new": torch.ones(1, 1, 3, 1)}
    start = torch.tensor(0, dtype=torch.int32)
    convert({"write": (Writes().eval(), sample | {"start": start})}, path)
    write = open_tflite(path).get_signature_runner("write")
    given = {name: part.numpy() for name, part in sample.items()}
    written = [write(**given, start=np.array(s, np.int32))["stored"] for s in starts]
    first = [int(places.flatten().argmax()) for places in written]
    assert first == [0, 2, 4, 4, 4, 0]
    assert all(places.sum() == 3 for places in written)


class Other(nn.Module):
    """Something else that has two entries."""

    def forward(self, tokens, kv):
        return {"kv": {name: part + tokens for name, part in kv.items()}}


@pytest.mark.usefixtures("converter", "unchecked")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("decode", "prefill"), "does not take tokens, input_pos and a cache kv"),
        (("decode",), r"has entries \['decode'\], expected prefill and decode"),
    ],
)
def test_other_models_are_refused(tmp_path, names, said):
    path = tmp_path / "other.tflite"
    sample = {"tokens": torch.ones(1, 1), "kv": {"k_0": torch.ones(1, 1)}}
    convert({name: (Other().eval(), sample) for name in names}, path)
    with pytest.raises(ValueError, match=said):
        EdgeRunner(path)
