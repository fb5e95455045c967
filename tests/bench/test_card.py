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
from tests.bench.card import main as card_main
from tests.bench.card import report, smoke
from tests.bench.card.main import main
from tests.bench.card.models import as_deep_as_fits
from tests.bench.card.report import Part, Report, Setting

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
    assert list(parts) == ["smoke", "kernels", "decode", "shapes", "serve", "peer"]
    assert all(part["complete"] for part in parts.values())
    (greedy,) = parts["smoke"]["greedy"]
    assert greedy["equal"] > 0.8 * greedy["tokens"] > 0
    assert [(row["backend"], row["dtype"]) for row in parts["smoke"]["logits"]] == [
        ("reference", "bfloat16"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    ]
    assert parts["kernels"]["left_out"] == ["kernels: Triton is not installed"]
    assert [row["batch"] for row in parts["decode"]["batches"]] == [1, 3, 1, 3]
    assert len(parts["shapes"]["shapes"]) == 2
    (missing,) = parts["serve"]["left_out"]
    assert missing.startswith("fastapi, httptools,")
    assert missing.endswith("not installed, and not among --wheels")
    assert parts["peer"]["left_out"] == ["transformers: not installed, and not among --wheels"]


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


def test_what_fails_is_recorded_and_the_rest_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "first", "--part", "second"]
    calls: list[str] = []

    def first(_setting: Setting, part: Part) -> None:
        calls.append("first")
        part.row("times", number=len(calls))
        if len(calls) == 1:
            raise RuntimeError("no luck")

    def second(_setting: Setting, part: Part) -> None:
        calls.append("second")
        part.set(answer=42)

    monkeypatch.setattr(card_main, "PARTS", {"first": first, "second": second})
    assert main(arguments) == 1
    assert "no luck" in read(tmp_path)["parts"]["first"]["error"]
    assert main([*arguments, "--resume"]) == 0
    assert calls == ["first", "second", "first"], "what is complete is not run again"
    parts = read(tmp_path)["parts"]
    assert parts["first"]["times"] == [{"number": 1}, {"number": 3}], "rows are kept"
    assert parts["second"]["answer"] == 42
    assert "error" not in parts["first"]

    monkeypatch.setattr(card_main, "ANEW", {"first"})
    assert main([*arguments[:-4], "--part", "first"]) == 0
    assert list(read(tmp_path)["parts"]) == ["first"], "without --resume nothing is kept"


def test_parts_that_check_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the run before says nothing of what was wrong then."""
    fails = [True, False]

    def check(_setting: Setting, part: Part) -> None:
        part.row("checks", kernel="norm")
        assert not fails.pop(0)

    monkeypatch.setattr(card_main, "PARTS", {"kernels": check})
    for status in (1, 0):
        assert main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "kernels", "--resume"]) == status
    assert read(tmp_path)["parts"]["kernels"]["checks"] == [{"kernel": "norm"}]


def test_another_machine_is_no_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"machine": "another", "tiny": True, "parts": {}}))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--resume"])
    assert "is of another machine or size" in capsys.readouterr().err


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
    found.part("tune").end("Traceback")
    assert (found.failed, found.incomplete) == (["tune"], ["kernels"])
    part.end()
    assert found.incomplete == []


def test_a_part_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Report(tmp_path / "card.json", {}).part("kernels")
    assert part.has_time("something", seconds=60)
    monkeypatch.setattr(report, "PART_SECONDS", 0.0)
    assert not part.has_time("more")
    assert not part.has_time("and more")
    part.end()
    own = read(tmp_path)["parts"]["kernels"]
    assert own["left_out"] == ["more: no time", "and more: no time"]
    assert not own["complete"]


def test_a_part_that_leaves_out_what_cannot_be_is_complete(tmp_path: Path) -> None:
    part = Report(tmp_path / "card.json", {}).part("decode")
    part.leave_out("batch 256", "too large")
    part.end()
    assert read(tmp_path)["parts"]["decode"]["complete"]
