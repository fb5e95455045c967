"""Parts serve and peer of the card script at tiny size, and packages from wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.card import packages, peer, serve
from tests.bench.card.main import main
from tests.bench.card.packages import environment_with
from tests.bench.card.peer import Work, rates
from tests.bench.card.report import Part, Report, Setting


def run(folder: Path, part: str, *options: str, status: int = 0) -> dict[str, Any]:
    assert main(["--out", str(folder), "--tiny", "--device", "cpu", "--part", part, *options]) == status
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())["parts"][part]
    return found


def processes_in(folder: Path) -> list[str]:
    """Live processes whose working directory is or was below `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(path.joinpath("cwd").readlink()).startswith(str(folder)):
                found.append(path.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def test_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # so that the server's folder is known
    found = run(tmp_path, "serve")
    rows = found["serve"]
    assert [(row["concurrency"], row["completed"], row["failed"]) for row in rows] == [(1, 2, 0), (2, 2, 0)]
    for row in rows:
        assert row["output_throughput"] == pytest.approx(2 * 4 / row["duration"])
        assert row["total_token_throughput"] == pytest.approx(2 * (16 + 4) / row["duration"])
        assert row["median_ttft_ms"] > 0
        assert row["cached_input_tokens"] == 0
    assert found["complete"]
    assert "mixtral" in (tmp_path / "serve.log").read_text()
    assert processes_in(tmp_path) == [], "server and engine have ended"
    # Nothing is left to do, so no server is started.
    (tmp_path / "serve.log").unlink()
    own = json.loads((tmp_path / "card.json").read_text())
    own["parts"]["serve"]["complete"] = False
    (tmp_path / "card.json").write_text(json.dumps(own))
    assert run(tmp_path, "serve", "--resume")["serve"] == rows
    assert not (tmp_path / "serve.log").exists()


def test_a_server_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TINY_SIZES", serve.Sizes((1,), 16, 4, 1, 2, 9999))
    error = run(tmp_path, "serve", status=1)["error"]
    assert "the server ended with exit code 1" in error
    assert "max_model_len 9999 is over the model's context of 256 tokens" in error


def test_requests_that_fail_are_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [1, 0, 0]

    @contextmanager
    def server(*_arguments: Any) -> Iterator[str]:
        yield ""

    monkeypatch.setattr(serve, "_server", server)
    monkeypatch.setattr(serve, "_load", lambda *_: {"completed": 9, "failed": failed.pop(0)})
    first = run(tmp_path, "serve", status=1)
    assert "1 requests failed" in first["error"]
    assert [(row["concurrency"], row["failed"]) for row in first["failed"]] == [(1, 1)]
    second = run(tmp_path, "serve", "--resume")
    assert [(row["concurrency"], row["failed"]) for row in second["serve"]] == [(2, 0), (1, 0)]
    assert second["complete"]


def test_peer(tmp_path: Path) -> None:
    found = run(tmp_path, "peer")
    theirs, ours = found["engines"]
    assert (theirs["engine"], ours["engine"]) == ("transformers", "mixserve")
    for row in (theirs, ours):
        assert row["num_layers"] == 2
        assert row["dtype"] == "float32"
        assert 2 <= row["distinct_experts"] <= 6
        assert all(row[name] > 0 for name in ("output_tok_s", "prefill_tok_s", "decode_tok_s"))
    (ratio,) = found["ratio"]
    assert ratio["output_tok_s"] == pytest.approx(ours["output_tok_s"] / theirs["output_tok_s"])
    assert ratio["goal"] == 5.0
    assert found["complete"]


def test_a_peer_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "TINY_WORK", Work(batch=2, input_len=0, output_len=2, rounds=1))
    assert "transformers failed" in run(tmp_path, "peer", status=1)["error"]


def test_rates_are_of_the_median_round() -> None:
    work = Work(batch=2, input_len=10, output_len=6, rounds=3)
    assert rates(work, [1.0, 2.0, 9.0], [7.0, 5.0, 4.0]) == {
        "output_tok_s": 12 / 5,
        "prefill_tok_s": 20 / 2,
        "decode_tok_s": 10 / 3,
    }


def write_wheel(folder: Path, name: str, body: str) -> None:
    """A package of one module."""
    info = f"{name}-1.0.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", body)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def part_in(folder: Path) -> Part:
    return Report(folder / "card.json", {}).part("serve")


def test_packages_come_from_wheels(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "carried_here", "ANSWER = 42\n")
    setting = Setting(torch.device("cpu"), tiny=True, out=tmp_path, wheels=tmp_path / "wheels")
    with environment_with(setting, part_in(tmp_path), ["torch", "carried_here"]) as environment:
        assert environment is not None
        code = "import carried_here, tests.bench.card; print(carried_here.ANSWER)"
        found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
        assert found.stdout == b"42\n", found.stderr
        site = Path(environment["PYTHONPATH"].split(os.pathsep)[1])
        assert (site / "carried_here.py").exists()
    assert not site.exists()


def test_packages_that_wheels_lack_are_named(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "carried_here", "")
    setting = Setting(torch.device("cpu"), tiny=True, out=tmp_path, wheels=tmp_path / "wheels")
    part = part_in(tmp_path)
    with environment_with(setting, part, ["carried_here", "left_at_home"]) as environment:
        assert environment is None
    part.end()
    own = json.loads((tmp_path / "card.json").read_text())["parts"]["serve"]
    assert own["left_out"] == ["left_at_home: not installed, and not among --wheels"]


def test_wheels_that_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="has no wheels"):
        packages.install(tmp_path / "empty", tmp_path / "site")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "other-1.0-cp30-none-any.whl").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cannot be installed: .*not a supported wheel"):
        packages.install(tmp_path / "broken", tmp_path / "site")
