"""`mixserve bench serve`, a process of its own, against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import Server


def bench(server: Server, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "bench", "serve", "--base-url", f"{server.url}/v1", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_sweep(tiny_server: Server, endpoint: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")]
    result = bench(
        tiny_server,
        *("--endpoint", endpoint, "--sweep", "1,4", "--num-prompts", "8", "--input-len", "30", "--output-len", "9"),
        *("--goodput", "ttft:60000", "--server-pid", str(tiny_server.process.pid), *files),
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["model_id"] == "tiny"
    for run, concurrency in zip(found["runs"], (1, 4), strict=True):
        assert (run["max_concurrency"], run["completed"], run["errors"]) == (concurrency, 8, {})
        assert run["total_output_tokens"] == 72
        assert run["output_tokens_counted_by"] == "server"
        # Ids are exactly so many; words are several bytes each, and a chat's template adds its own tokens.
        assert 8 * 30 <= run["total_input_tokens"] <= 8 * (30 if endpoint == "completions" else 80)
        assert 0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == pytest.approx(run["request_throughput"])
        assert run["peak_memory_bytes"] > 100e6
    assert (tmp_path / "x.html").read_text().count("<svg") == 4


def test_a_shared_prefix_is_found_in_the_cache(tiny_server: Server, tmp_path: Path) -> None:
    flags = ["--dataset", "shared-prefix", "--prefix-len", "64", "--input-len", "16", "--output-len", "2"]
    result = bench(tiny_server, *flags, "--max-concurrency", "1", "--json", str(tmp_path / "x.json"))
    assert result.returncode == 0, result.stderr
    (run,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert run["total_input_tokens"] == 16 * 80
    assert run["cached_input_tokens"] == 15 * 64, "all but the first have it"


def test_what_the_server_refuses_is_one_line(tiny_server: Server) -> None:
    result = bench(tiny_server, "--input-len", "4000")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("mixserve: error: the first request failed: HTTP 400: ")
    assert "2048" in result.stderr
    assert result.stderr.count("\n") == 1
