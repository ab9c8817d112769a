"""The benchmark runs, on a tiny model. Nothing here depends on how long it takes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig
from tests.bench import (
    contenders,
    edge,
    edge_contenders,
    edge_exports,
    edge_report,
    gguf_files,
    gpu,
    report,
    worker,
)
from tests.bench.__main__ import main, run

NAMES = ["plain", "fast", "transformers"]
LIMITS = {"bytes": 1e9, "float32": 1e9, "bfloat16": 4e9}


@pytest.fixture(scope="module")
def tiny(make_checkpoint):
    return make_checkpoint(tied=True)


@pytest.fixture(scope="module")
def runners(tiny):
    return [kind(tiny.path) for kind in worker.TORCH]


@torch.inference_mode()
def test_the_contenders_compute_the_same(runners):
    tokens = contenders.prompt(2, 12, 97)
    plain, fast, theirs = (r.prefill(tokens)[:, -1] for r in runners)
    torch.testing.assert_close(plain, theirs, rtol=1e-4, atol=1e-4)
    assert (fast - theirs).norm() < 0.05 * theirs.norm()
    for runner in runners:
        torch.testing.assert_close(
            runner.first_logits(tokens)[:, -1], runner.prefill(tokens)[:, -1]
        )


def test_every_contender_has_a_time_in_every_row(runners):
    prefill = worker.prefill_row(runners, 2, 16, repeats=2, vocab_size=97)
    decode = worker.decode_row(runners, 2, 8, steps=3, repeats=2, vocab_size=97)
    for found in (prefill, decode):
        assert list(found) == NAMES
        assert all(ms > 0 for ms in found.values())
    # Each began where the others did, and can begin there again.
    lengths = [layer.length for runner in runners[:2] for layer in runner.cache]
    assert lengths == [8 + 3] * 6
    assert runners[2].cache.get_seq_length() == 8


def test_works_take_turns_and_the_median_counts():
    order, times = [], iter([5, 1, 1, 9, 3, 2])

    def work(name):
        order.append(name)
        return next(times)

    found = worker.measure({n: lambda n=n: work(n) for n in "ab"}, repeats=3)
    assert order == list("ababab")
    assert found == {"a": 3, "b": 2}


def test_a_profile_names_the_operators_by_their_share(runners):
    tokens = contenders.prompt(1, 16, 97)
    found = worker.profile(runners[0], lambda r: r.prefill(tokens), top=4)
    shares = [share for _, share in found]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert all(name.startswith("aten::") for name, _ in found)


def test_the_limits_are_measured():
    found = worker.limits(megabytes=1, size=64, repeats=1)
    assert set(found) == {"bytes", "float32", "bfloat16"}
    assert all(value > 0 for value in found.values())


def test_every_row_that_is_behind_has_a_profile(tiny, monkeypatch):
    """Which rows those are is decided here: a measurement would be chance."""
    monkeypatch.setattr(worker, "limits", lambda: LIMITS)
    ahead, behind = ({"plain": t, "fast": 1, "transformers": 2} for t in (1, 3))
    monkeypatch.setattr(worker, "prefill_row", lambda _, batch_size, *more: behind)
    monkeypatch.setattr(
        worker, "decode_row", lambda _, b, context, *more: (ahead, behind)[b == 2]
    )
    job = {"directory": str(tiny.path), "gguf": {}, "repeats": 1, "prefill": 8}
    job |= {"contexts": [6], "batches": [1, 2], "steps": 4, "vocab_size": 97}
    monkeypatch.setattr(worker, "profile", lambda runner, work: [])
    assert set(worker.table(job)["profiles"]) == {
        "prefill, 8 tokens, batch 1",
        "prefill, 8 tokens, batch 2",
        "decode, context 6, batch 2",
    }


def test_a_load_is_measured_in_a_process_of_its_own(tiny):
    job = {"name": "plain", "directory": str(tiny.path), "vocab_size": 97}
    found = run("load", job)
    assert 0 < found["seconds"] < found["seconds to first logits"]
    assert 0 <= found["peak"] <= found["peak to first logits"]


# The limits beside the rows


def test_a_decode_step_reads_the_weights_and_the_cache_once():
    found = {"limits": LIMITS | {"float32": 1e15}, "weight_bytes": {"plain": 4}}
    cache = 2 * 30 * 192 * 4 * 1024
    expected = (4 * report.PARAMETERS + 3 * cache) / 1e9
    assert report.seconds("decode, context 1024, batch 3", "plain", found) == expected


def test_a_prefill_multiplies_every_weight_with_every_token():
    found = {"limits": LIMITS | {"bytes": 1e15}, "weight_bytes": {"plain": 4}}
    blocks, head = report.PARAMETERS - 49152 * 576, 49152 * 576
    # Scores and averages: of 576 features each, over half of the pairs of tokens.
    expected = 2 * (512 * blocks + head + 30 * 2 * 576 * 512**2 / 2) / 1e9
    assert report.seconds("prefill, 512 tokens, batch 2", "plain", found) == expected


# The page


def a_table():
    times = {"plain": 8.0, "fast": 2.5, "transformers": 10.0}
    return {
        "rows": {"decode, context 128, batch 1": times},
        "profiles": {"decode, context 128, batch 1": {"plain": [("aten::mm", 0.75)]}},
        "limits": LIMITS,
        "weight_bytes": {"plain": 4, "fast": 1, "transformers": 4},
    }


def test_the_report_says_how_many_times_as_fast():
    first = {"seconds to first logits": 3.0, "peak to first logits": 600.0}
    load = {"seconds": 1.0, "peak": 500.0} | first
    loading = {"transformers": load, "plain": load | {"seconds": 0.5, "peak": 999.0}}
    text = report.write({2: a_table()}, loading, {})
    row = "| decode, context 128, batch 1 | 10.0 | 8.0 (1.25×) | 2.5 (4.00×) |"
    assert row in text
    assert "### 2 threads" in text
    assert "- plain: `aten::mm` 75%" in text
    assert "| plain | 0.50 (2.00×) | 999 | 3.00 (1.00×) | 600 |" in text


def test_the_report_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", "utf-8")
    report.put_into(page, "new")
    report.put_into(page, "newer")
    expected = f"before\n{report.START}\n\nnewer\n{report.END}\nafter\n"
    assert page.read_text("utf-8") == expected
    page.write_text("no marks", "utf-8")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.put_into(page, "new")


# The file for llama.cpp, and the GPU's step


def test_a_gguf_file_in_float32_holds_the_same(make_gguf, tmp_path):
    source = make_gguf(gguf.GGMLQuantizationType.Q8_0).path
    gguf_files.to_float32(source, tmp_path / "full.gguf")
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "full.gguf")
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert after.name == before.name
        assert after.tensor_type == gguf.GGMLQuantizationType.F32
        expected = gguf.quants.dequantize(before.data, before.tensor_type)
        assert np.array_equal(after.data, expected)
    for name, field in old.fields.items():
        if not name.startswith("GGUF."):
            assert new.fields[name].contents() == field.contents()


def test_the_graph_s_step_generates_what_generate_does(tiny):
    model, tokens = tiny.model, contenders.prompt(2, 6, 97)
    expected = generate(model, tokens, max_new_tokens=9)
    with torch.inference_mode():
        cache = model.new_cache(2, 20)  # more room than is used
        model(tokens[:, :-1], cache)
        step = gpu.GraphStep(model, cache, tokens[:, -1:])
        found = [step().clone() for _ in range(9)]
    assert torch.equal(torch.cat([tokens, *found], dim=1), expected)


# The device's tables


@pytest.fixture(scope="module")
def edge_job(converter, tiny, tmp_path_factory):
    """The tiny one stands for both models, and two files for all."""
    folder, sizes = tmp_path_factory.mktemp("edge"), {"prefill": 8, "cache": 32}
    wanted = {"float32": sizes, "int8": sizes | {"quantize": "int8"}}
    files = edge_exports.exports(folder, tiny.path, wanted, run)
    names = ("small", "SmolLM2")
    return {
        "repeats": 1,
        "steps": dict.fromkeys(names, 3),
        "directories": dict.fromkeys(names, str(tiny.path)),
        "files": dict.fromkeys(names, files),
        "context": 16,
        "texts": contenders.prompt(2, 20, 97).tolist(),
    } | sizes


@pytest.fixture(scope="module")
def edge_runners(tiny, edge_job):
    files = edge_job["files"]["small"]
    found = edge.make_runners(str(tiny.path), files, 1, edge_job)
    return {runner.name: runner for runner in found}


def test_an_export_is_made_once(tiny, edge_job, tmp_path):
    made = edge_job["files"]["small"]["int8"]
    assert made["bytes"] > 1000
    assert made["seconds"] > 0
    assert made["peak"] > 100
    calls = []

    def fake(work, job):
        calls.append((work, job))
        Path(job["path"]).touch()
        return {"path": job["path"], "bytes": 1}

    wanted = {"int8, other": {"quantize": "int8"}}
    first = edge_exports.exports(tmp_path, tiny.path, wanted, fake)
    again = edge_exports.exports(tmp_path, tiny.path, wanted, fake)
    assert first == again
    (call,) = calls
    assert call[0] == "edge export"
    assert call[1]["quantize"] == "int8"
    (tmp_path / "int8-other.json").write_text('{"fingerprint": "of other code"}')
    edge_exports.exports(tmp_path, tiny.path, wanted, fake)
    assert len(calls) == 2


@torch.inference_mode()
@pytest.mark.parametrize("change", ["repeat", "index_copy"])
def test_an_idea_switched_off_changes_no_number(tiny, change, unchecked):
    """Only the operators: that is why they can be compared."""
    from annotated_src.edge_model import make_entries

    tokens, places = torch.tensor([[5, 3, 8]]), torch.arange(3)
    found = []
    for what in (None, change):
        with edge_exports.changed(what):
            entry, sample = make_entries(tiny.model, 4, 8)["decode"]
            with edge_contenders.CountOperators() as counter:
                found.append((entry(tokens, places, sample["kv"]), counter.counts))
    (usual, counts), (other, other_counts) = found
    assert counts != other_counts
    torch.testing.assert_close(usual, other)


@torch.inference_mode()
def test_the_device_s_contenders_compute_the_same(tiny, edge_runners, edge_job):
    ids = edge_job["texts"][0]
    expected = tiny.model(torch.tensor([ids]))[0]
    floats = edge_runners[".tflite float32"].runner.logits(ids)
    np.testing.assert_allclose(floats, expected, atol=1e-4)
    kind, file = edge_contenders.Handed, edge_job["files"]["small"]["float32"]
    handed = kind("handed over", file["path"], 1, 4)
    handed.ready(1, 0, 1)
    found = [handed.step(token, place) for place, token in enumerate(ids)]
    assert np.array_equal(np.stack(found), floats)
    # As decode is timed: from the same place on, however often.
    for runner in edge_runners.values():
        runner.ready(1, 16, 3)
        assert runner.decode(contenders.prompt(1, 16, 97), 3) > 0
    assert edge_runners[".tflite int8"].runner.length == 16 + 3
    reader = edge_runners[".tflite float32"]
    first = reader.prefill(torch.tensor([ids[:8]]))
    np.testing.assert_allclose(first, expected[7], atol=1e-4)
    eager = edge_runners["exported code, in torch"]
    found = eager.prefill(torch.tensor([ids[:8]]))[0, 0]
    torch.testing.assert_close(found, expected[7], atol=1e-4, rtol=1e-4)


def test_without_the_converter_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--edge"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "an export needs the edge extra" in capsys.readouterr().err


def test_the_device_s_tables_are_rehearsed(edge_job, monkeypatch):
    monkeypatch.setattr(worker, "limits", lambda: LIMITS)
    found = edge.table(edge_job)
    assert set(found["rows"]) == {
        "small: prefill, 8 tokens",
        "small: decode",
        "SmolLM2: prefill, 8 tokens",
        "SmolLM2: decode",
    }
    assert set(found["rows"]["small: decode"]) == set(edge_report.ORDER)
    assert "float32, handed over" in found["ideas"]["small"]
    graded = edge.quality(edge_job)
    assert graded["float32"]["agreement"] == 1
    assert graded["float32"]["worst"] < 1e-4
    assert 0 < graded["int8"]["mean_kl"] < 0.1
    files = edge_job["files"]
    openings = {
        name: edge.opening(files["small"][name]["path"], 1) for name in ("int8",)
    }
    assert 0 < openings["int8"]["open"] < openings["int8"]["first"]
    text = edge_report.write({1: found}, files, graded, openings, edge_job)
    for words in (
        "### 1 thread",
        "| small: decode |",
        "| SmolLM2: ms |",
        "handed over |",
    ):
        assert words in text
    assert "Teacher-forced on 40 tokens" in text
    assert "Medians of 1 turns of SmolLM2, and of 5 of the small model" in text
    assert "nan" not in text


def test_a_cache_is_copied_to_fresh_memory_and_to_memory_at_hand():
    said = edge.fresh_memory(places=2000, layers=2, repeats=2)
    assert "a cache of 2000 places, 6 MB, in" in said  # 2 L places numbers, 4 bytes


def test_a_device_s_step_moves_weights_and_cache():
    sizes = {"num_layers": 2, "embed_dim": 12, "num_heads": 6, "num_kv_heads": 2}
    sizes |= {"head_dim": 4, "ffn_dim": 20, "vocab_size": 31}
    model = Llama(LlamaConfig(**sizes, max_seq_len=64, norm_eps=1e-5, rope_base=1e4))
    weights = sum(w.numel() for w in model.parameters() if w.ndim == 2) - 31 * 12
    cache = sum(layer.num_bytes for layer in model.new_cache(1, 10))
    for width, times in ((4, 7), (1, 1)):
        one = {"weight_bytes": width, "moved": 10 * times}
        expected = width * weights + times * cache
        assert edge_report.step_bytes(sizes, one) == expected


def test_the_device_s_table_says_how_many_times_as_fast():
    cells = {edge_report.PEER: 8.0, "plain": 4.0}
    assert edge_report.cell(cells, edge_report.PEER) == "8.00"
    assert edge_report.cell(cells, "plain") == "4.00 (2.0×)"
    assert edge_report.cell(cells, "fast") == "–"
