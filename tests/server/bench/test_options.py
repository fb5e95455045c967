"""Flags of `mixserve bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from tests.server.bench.runs import make_options


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each command would be run with; nothing is run."""
    found: list[Any] = []

    def run(options: Any, **files: Path | None) -> None:
        found.append((options, files))

    monkeypatch.setattr("server.bench.serve.bench_serve", run)
    monkeypatch.setattr("server.bench.offline.bench_offline", run)
    for name in ("MIXSERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["serve", "model"],
        ["serve", "--base-url", "localhost:8000"],
        ["serve", "--endpoint", "embeddings"],
        ["serve", "--dataset", "sharegpt"],
        ["serve", "--num-prompts", "0"],
        ["serve", "--range-ratio", "1.5"],
        ["serve", "--prefix-len", "5"],
        ["serve", "--num-prefixes", "2", "--dataset", "random"],
        ["serve", "--max-concurrency", "0"],
        ["serve", "--max-concurrency", "4", "--sweep", "1,2"],
        ["serve", "--sweep", "1,,2"],
        ["serve", "--sweep", "0"],
        ["serve", "--request-rate", "0"],
        ["serve", "--request-rate", "inf"],
        ["serve", "--goodput"],
        ["serve", "--goodput", "ttft"],
        ["serve", "--goodput", "itl:50"],
        ["serve", "--goodput", "ttft:x"],
        ["serve", "--goodput", "ttft:-1"],
        ["serve", "--seed", "-1"],
        ["offline", "a", "b"],
        ["offline", "--batch", "x"],
        ["offline", "--output-len", "1"],
        ["offline", "--rounds", "0"],
        ["offline", "--dtype", "int3"],
        ["offline", "--backend", "magic"],
    ],
    ids=" ".join,
)
def test_unknown_flags_and_values_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *argv])
    assert exit_info.value.code == 2
    assert "usage: mixserve" in capsys.readouterr().err


def test_serve(options: list[Any], tmp_path: Path) -> None:
    assert main(["bench", "serve"]) == 0
    assert options.pop() == (make_options(concurrencies=(None,)), {"json_file": None, "html_file": None})
    (tmp_path / "x.jsonl").touch()
    main(["bench", "serve", "--dataset", str(tmp_path / "x.jsonl"), "--sweep", "2,1,2", "--html", "y"])
    found, files = options.pop()
    assert (found.dataset, found.ignore_eos, found.concurrencies) == (tmp_path / "x.jsonl", False, (2, 1, 2))
    assert files["html_file"] == Path("y")
    main(["bench", "serve", "--dataset", str(tmp_path / "x.jsonl"), "--ignore-eos"])
    assert options.pop()[0].ignore_eos is True
    main(["bench", "serve", "--no-ignore-eos", "--goodput", "ttft:500", "tpot:50.5", "--request-rate", "3"])
    found, _ = options.pop()
    assert (found.ignore_eos, found.goodput, found.request_rate) == (False, {"ttft": 500.0, "tpot": 50.5}, 3.0)
    main(["bench", "serve", "--dataset", "shared-prefix"])
    assert (options[-1][0].lengths.prefix_len, options.pop()[0].lengths.num_prefixes) == (256, 1)
    main(["bench", "serve", "--dataset", "shared-prefix", "--prefix-len", "9", "--num-prefixes", "2"])
    assert (options[-1][0].lengths.prefix_len, options.pop()[0].lengths.num_prefixes) == (9, 2)


def test_offline(options: list[Any], tmp_path: Path) -> None:
    argv = ["bench", "offline", str(tmp_path), "--batch", "1,8"]
    assert main(argv) == 0
    found, files = options.pop()
    assert (found.path, found.name, found.batches, found.input_len) == (tmp_path, str(tmp_path), (1, 8), 128)
    assert [found.output_of(batch) for batch in (1, 8, 9, 32)] == [64, 64, 32, 32]
    assert (found.engine, files) == ({}, {"json_file": None})
    flags = ["--dtype", "bfloat16", "--backend", "torch", "--output-len", "5", "--rounds", "7", "--json", "x"]
    assert main([*argv, *flags]) == 0
    found, files = options.pop()
    assert (found.engine, found.rounds, files) == (
        {"dtype": "bfloat16", "backend": "torch"},
        7,
        {"json_file": Path("x")},
    )
    assert [found.output_of(batch) for batch in (1, 32)] == [5, 5]


def test_offline_without_a_model_is_the_demo(
    options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.demo.demo_model", lambda cache, **_: cache / "demo")
    monkeypatch.setenv("MIXSERVE_CACHE", str(tmp_path))
    assert main(["bench", "offline"]) == 0
    assert (options[0][0].path, options[0][0].name) == (tmp_path / "demo", "mixserve-demo")


@pytest.mark.parametrize("kind", ["serve", "offline"])
def test_help_is_quick(kind: str) -> None:
    code = (
        f"import sys\nfrom server.cli import main\ntry:\n    main(['bench', '{kind}', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'msgspec', 'httptools', 'tqdm', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
