"""The card script works at tiny size on the CPU, with no more packages than a GPU box has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.torch import TorchBackend
from tests.bench import card

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


def test_every_part_runs_from_a_checkout(tmp_path: Path) -> None:
    script = Path(card.__file__)
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT}))\n"  # None: importing it is an ImportError
        f"sys.argv = ['card.py', '--out', {str(tmp_path / 'out')!r}, '--tiny', '--device', 'cpu']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all parts passed\n")
    report = read(tmp_path / "out")
    assert report["machine"]["device"] == "cpu"
    smoke, decode = report["parts"]["smoke"], report["parts"]["decode"]
    assert smoke["greedy_equal"] > 0.8 * smoke["greedy_tokens"] > 0
    assert [row["batch_size"] for row in decode["batches"]] == [1, 3]
    assert all(row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 for row in decode["batches"])


def test_one_part_alone(tmp_path: Path) -> None:
    assert card.main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "decode"]) == 0
    assert list(read(tmp_path)["parts"]) == ["decode"]


def test_a_backend_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchBackend.rms_norm

    def slightly_wrong(self: TorchBackend, param: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return original(self, param, x, eps) * 1.001

    monkeypatch.setattr(TorchBackend, "rms_norm", slightly_wrong)
    assert card.main(["--out", str(tmp_path), "--tiny", "--device", "cpu"]) == 1
    parts = read(tmp_path)["parts"]
    assert "AssertionError" in parts["smoke"]["error"]
    assert parts["decode"]["batches"]


def test_greedy_tokens_that_differ_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchBackend.logits
    monkeypatch.setattr(card, "logits_of", lambda *_: torch.ones(1))
    monkeypatch.setattr(TorchBackend, "logits", lambda *arguments: -original(*arguments))
    assert card.main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "smoke"]) == 1
    assert "instead of" in read(tmp_path)["parts"]["smoke"]["error"]


def test_depth_is_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 10**9, 80 * 10**9))
    config = card.as_deep_as_fits(torch.device("cuda"), 128 * 256)
    assert 20 <= config.num_layers <= 24
    assert config.hidden_size == 4096
    assert card.as_deep_as_fits(torch.device("cuda"), 400_000).num_layers < config.num_layers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**9, 80 * 10**9))
    with pytest.raises(RuntimeError, match="not even one layer"):
        card.as_deep_as_fits(torch.device("cuda"), 1)
