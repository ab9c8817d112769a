"""The benchmark runs, on a tiny model. Nothing here depends on how long it takes."""

import gguf
import numpy as np
import pytest
import torch

from annotated_src.generate import generate
from tests.bench import contenders, gguf_files, gpu, report, worker
from tests.bench.__main__ import run

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
