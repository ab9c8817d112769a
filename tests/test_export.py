"""The export and its command: what is refused, and that nothing half made stays."""

import re
import shutil
import subprocess
import sys

import jaxtyping
import pytest
import torch

from annotated_src import edge, export
from annotated_src.edge import EdgeRunner
from annotated_src.export import edge_generate, export_tflite, main
from annotated_src.generate import generate
from annotated_src.models import llama
from annotated_src.tflite_file import stored_bytes

PROGRAM = "python -m annotated_src.export"
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama.Llama(llama.tiny_config()).eval()


@pytest.fixture(scope="module")
def exported(converter, tmp_path_factory):
    """What is exported of the model of each test: prefill 4, cache 8."""
    torch.manual_seed(0)
    same = llama.Llama(llama.tiny_config()).eval()
    path = tmp_path_factory.mktemp("export") / "model.tflite"
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        export_tflite(same, path, 4, 8)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return path


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run main where it ends with an error; return its status and its last line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert out == ""
        return caught.value.code, err.splitlines()[-1]

    return run


def test_the_command_exports_what_a_directory_holds(
    converter, make_checkpoint, tmp_path
):
    path, _, model = make_checkpoint(num_kv_heads=2)
    target = tmp_path / "out.tflite"
    command = [sys.executable, *PROGRAM.split()[1:], path, target]
    sizes = ["--prefill", "8", "--cache", "32", "--quantize", "int8"]
    done = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    stages = [re.sub(r"^ +\d+ s  ", "", line) for line in done.stderr.splitlines()]
    assert stages[:5] == [
        f"reading {path}",
        "loading litert",
        "converting",
        "comparing",
        "quantizing: int8",
    ]
    assert re.fullmatch(rf"wrote {target}: 0\.\d MB", stages[5])
    assert len(stages) == 6
    runner = EdgeRunner(target)
    assert (runner.prefill_len, runner.cache_len, runner.vocab_size) == (8, 32, 97)
    assert stored_bytes(target)["INT8"]
    scores = torch.from_numpy(runner.logits(list(range(20)), 8))
    ours = model(torch.arange(20)[None])[0, 7:]
    assert (scores - ours).abs().max() < 0.1 * ours.abs().max()
    assert [item.name for item in tmp_path.iterdir()] == ["out.tflite"]


def test_what_exists_is_replaced_only_by_force(monkeypatch, model, exported, tmp_path):
    target = tmp_path / "out.tflite"
    target.write_text("mine")
    with pytest.raises(ValueError, match=r"out\.tflite exists; force \(--force\)"):
        export_tflite(model, target, 4, 8)
    assert target.read_text() == "mine"
    monkeypatch.setattr(
        export, "convert", lambda entries, path: shutil.copyfile(exported, path)
    )
    stages = []
    export_tflite(model, target, 4, 8, force=True, progress=stages.append)
    assert stages == ["loading litert", "converting", "comparing"]
    ids = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=6)[0, 3:]
    assert edge_generate(target, [5, 6, 7], 6) == ids.tolist()
    assert edge_generate is edge.edge_generate


@pytest.mark.parametrize(
    "stage", ["load_litert", "convert", "_compare", "quantize_file"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(monkeypatch, model, tmp_path, stage, error):
    target = tmp_path / "out.tflite"
    target.write_text("mine")

    def fail(*given):
        for path in given:
            if hasattr(path, "write_text") and stage != "_compare":
                path.write_text("half")
        raise error("in the middle")

    for name in ("load_litert", "convert", "_compare"):
        monkeypatch.setattr(export, name, lambda *given: None)
    monkeypatch.setattr(export, stage, fail)
    with pytest.raises(error, match="in the middle"):
        export_tflite(model, target, 4, 8, quantize="int8", force=True)
    assert target.read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["out.tflite"]


def test_a_wrong_conversion_is_noticed(monkeypatch, model, exported, tmp_path):
    def copied(entries, path):
        shutil.copyfile(exported, path)

    monkeypatch.setattr(export, "convert", copied)
    export_tflite(model, tmp_path / "same.tflite", 4, 8)
    model.blocks[1].ffn.up_proj.weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match="converted model's scores are off by 0"):
        export_tflite(model, tmp_path / "other.tflite", 4, 8)
    assert [item.name for item in tmp_path.iterdir()] == ["same.tflite"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefill": 9, "cache": 8}, "prefill must be 1 to 8 .* got 9"),
        ({"prefill": 0}, "prefill must be 1 to 256 .* got 0"),
        ({"cache": 129}, "cache must be 1 to 128 tokens, the model's max_seq_len"),
        ({"prefill": 1, "cache": 0}, "prefill must be 1 to 0 tokens"),
        ({"cache": 128, "quantize": "int3"}, "quantize must be one of int8, .* 'int3'"),
        ({"cache": 128, "match": "("}, "no regular expression: missing"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        export_tflite(model, tmp_path / "out.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_without_numbers_or_exporter_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"float32 on the CPU, .* on meta"):
        export_tflite(model.to("meta"), tmp_path / "out.tflite", 4, 8)
    with pytest.raises(ValueError, match=r"no exporter for Linear"):
        export_tflite(torch.nn.Linear(2, 2), tmp_path / "out.tflite", 4, 8)


def test_what_comes_to_be_meanwhile_is_not_replaced(
    monkeypatch, model, exported, tmp_path
):
    target = tmp_path / "out.tflite"

    def convert_slowly(entries, path):
        shutil.copyfile(exported, path)
        target.write_text("mine")

    monkeypatch.setattr(export, "convert", convert_slowly)
    with pytest.raises(ValueError, match=r"out\.tflite exists"):
        export_tflite(model, target, 4, 8)
    assert target.read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["out.tflite"]


def test_a_target_is_a_file_in_a_directory(model, tmp_path):
    with pytest.raises(ValueError, match="is a directory, expected a file"):
        export_tflite(model, tmp_path, 4, 8, force=True)
    with pytest.raises(ValueError, match="nowhere is no directory"):
        export_tflite(model, tmp_path / "nowhere" / "out.tflite", 4, 8)


def test_the_command_s_errors_are_one_line(refused, make_checkpoint, tmp_path):
    path, target = make_checkpoint().path, tmp_path / "out.tflite"
    for arguments, status, said in (
        ((tmp_path / "none", target), 1, "config.json"),
        ((path, target, "--prefill", 65, "--cache", 64), 1, "prefill must be 1 to 64"),
        ((path, target, "--cache", 65), 1, "cache must be 1 to 64 tokens"),
        ((path, target, "--quantize", "int3"), 2, "invalid choice: 'int3'"),
        ((path,), 2, "required: out.tflite"),
        ((path, path), 1, "is a directory"),
    ):
        code, line = refused(*arguments)
        assert code == status
        assert line.startswith(PROGRAM.replace("python -m", "python -m") + ": ")
        assert said in line
    target.write_text("mine")
    code, line = refused(path, target)
    assert (code, line) == (
        1,
        f"{PROGRAM}: {target} exists; force (--force) replaces it",
    )
    assert target.read_text() == "mine"


@pytest.mark.parametrize("hidden", ["litert_torch", "ai_edge_quantizer"])
def test_a_missing_extra_is_named(request, make_checkpoint, tmp_path, hidden):
    if hidden != "litert_torch":  # or that would be missed first
        request.getfixturevalue("converter")
    code = f"""
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ImportError(f"{{name}} is hidden")
sys.meta_path.insert(0, Missing())
runpy.run_module("annotated_src.export", None, "__main__")
"""
    target = tmp_path / "out.tflite"
    command = [sys.executable, "-c", code, make_checkpoint().path, target]
    done = subprocess.run(
        [*command, "--cache", "64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "an export needs the edge extra" in done.stderr.splitlines()[-1]
    assert done.stderr.endswith(f"pip install '.[edge]' ({hidden} is hidden)\n")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_needs_no_stderr(monkeypatch, model, tmp_path):
    """It is None where it is closed from the start."""
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "out.tflite")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(export, "load_model", lambda path: model)

    def written(model, path, *, progress, **options):
        progress("converting")
        path.write_text("all")

    monkeypatch.setattr(export, "export_tflite", written)
    main()
    assert (tmp_path / "out.tflite").read_text() == "all"
