"""The card script works at tiny size on the CPU, with no more packages than a GPU box has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.torch import TorchBackend
from tests.bench import card
from tests.bench.card import report, smoke
from tests.bench.card.main import main
from tests.bench.card.models import as_deep_as_fits
from tests.bench.card.report import Report

ABSENT = [
    "fastapi",
    "gguf",
    "httptools",
    "huggingface_hub",
    "hypothesis",
    "msgspec",
    "openai",
    "prometheus_client",
    "psutil",
    "pydantic",
    "pytest",
    "starlette",
    "tqdm",
    "transformers",
    "uvicorn",
]


def read(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return result


def run_alone(out: Path, *options: str, environment: dict[str, str] | None = None, absent: list[str]) -> dict[str, Any]:
    """The report of the script, run as one does on a GPU box."""
    script = Path(card.__file__).parent
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # None: importing it is an ImportError
        f"sys.argv = ['card', '--out', {str(out)!r}, '--tiny', '--device', 'cpu', *{options}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=out.parent, capture_output=True, text=True, timeout=250, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all parts passed\n")
    return read(out)


def test_every_part_runs_from_a_checkout(tmp_path: Path) -> None:
    """Without Triton, too: then the kernels are left out, and it is said."""
    found = run_alone(tmp_path / "out", absent=[*ABSENT, "triton"])
    assert found["machine"]["device"] == "cpu"
    parts = found["parts"]
    assert list(parts) == ["smoke", "kernels", "decode"]
    (greedy,) = parts["smoke"]["greedy"]
    assert greedy["equal"] > 0.8 * greedy["tokens"] > 0
    assert [(row["backend"], row["dtype"]) for row in parts["smoke"]["logits"]] == [
        ("reference", "bfloat16"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    ]
    assert "Triton" in parts["kernels"]["left_out"]
    batches = parts["decode"]["batches"]
    assert [row["batch_size"] for row in batches] == [1, 3]
    assert all(row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 for row in batches)
    assert all(2 <= row["distinct_experts"] <= 6 for row in batches)


def test_one_part_alone(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "decode"]) == 0
    assert list(read(tmp_path)["parts"]) == ["decode"]


def test_a_backend_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchBackend.rms_norm

    def slightly_wrong(self: TorchBackend, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        return original(self, param, x, eps, rows) * 1.001

    monkeypatch.setattr(TorchBackend, "rms_norm", slightly_wrong)
    assert main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "smoke", "--part", "decode"]) == 1
    parts = read(tmp_path)["parts"]
    assert "AssertionError" in parts["smoke"]["error"]
    assert parts["decode"]["batches"]


def test_greedy_tokens_that_differ_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchBackend.logits
    monkeypatch.setattr(smoke, "logits_of", lambda *_: torch.ones(1))
    monkeypatch.setattr(TorchBackend, "logits", lambda *arguments: -original(*arguments))
    assert main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "smoke"]) == 1
    assert "instead of" in read(tmp_path)["parts"]["smoke"]["error"]


def test_depth_is_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 10**9, 80 * 10**9))
    gpu = torch.device("cuda")
    config = as_deep_as_fits(gpu, 128 * 256)
    assert 20 <= config.num_layers <= 24
    assert config.hidden_size == 4096
    assert as_deep_as_fits(gpu, 400_000).num_layers < config.num_layers
    assert as_deep_as_fits(gpu, 128 * 256, "fp8").num_layers == 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**9, 80 * 10**9))
    with pytest.raises(RuntimeError, match="not even one layer"):
        as_deep_as_fits(gpu, 1)


def test_every_row_is_written_at_once(tmp_path: Path) -> None:
    """A run that is cut off leaves what it had found."""
    found = Report(tmp_path / "card.json", {"machine": "this one"})
    part = found.part("kernels")
    part.row("times", us=1.0)
    assert read(tmp_path) == {"machine": "this one", "parts": {"kernels": {"times": [{"us": 1.0}]}}}
    part.row("times", us=2.0)
    part.set(copy=3.0)
    assert read(tmp_path)["parts"]["kernels"] == {"times": [{"us": 1.0}, {"us": 2.0}], "copy": 3.0}
    assert found.failed == []
    found.part("tune").set(error="Traceback")
    assert found.failed == ["tune"]


def test_a_part_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Report(tmp_path / "card.json", {}).part("kernels")
    assert part.has_time("something")
    monkeypatch.setattr(report, "PART_SECONDS", 0.0)
    assert not part.has_time("more")
    assert not part.has_time("and more")
    part.set(seconds=part.seconds)
    assert read(tmp_path)["parts"]["kernels"]["left_out"] == ["more", "and more"]
