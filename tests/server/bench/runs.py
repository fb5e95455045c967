"""Measured runs that nobody has measured."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.memory import Sample
from server.bench.metrics import ErrorCount, RunResult, Spread
from server.bench.prompts import Lengths
from server.bench.results import Measured
from server.bench.workload import ServeOptions


def make_run(concurrency: int | None = 8, **fields: Any) -> RunResult:
    streams = concurrency or 1
    spread = Spread(mean=20.0 * streams, median=19.5 * streams, p90=25.0 * streams, p99=31.25 * streams)
    return RunResult(
        **{
            "max_concurrency": concurrency,
            "request_rate": None,
            "duration": 10.0,
            "completed": 20,
            "failed": 0,
            "total_input_tokens": 2560,
            "total_output_tokens": 1280 * streams,
            "cached_input_tokens": 0,
            "counted": True,
            "request_goodput": None,
            "spreads": {"ttft": spread, "tpot": spread, "itl": spread, "e2el": spread},
            "errors": {},
            "client_cpu": 0.25,
            "peak_memory_bytes": None,
            **fields,
        }
    )


def make_options(**fields: Any) -> ServeOptions:
    return ServeOptions(
        **{
            "base_url": "http://127.0.0.1:8000",
            "model": None,
            "api_key": None,
            "endpoint": "completions",
            "dataset": "random",
            "num_prompts": None,
            "lengths": Lengths(input_len=128, output_len=64),
            "concurrencies": (1, 8),
            "request_rate": None,
            "ignore_eos": True,
            "seed": 0,
            "goodput": {},
            "server_pid": None,
            "tokenizer": None,
            **fields,
        }
    )


def make_measured(*runs: RunResult, memory: bool = True, model: str = "demo", **options: Any) -> Measured:
    samples = [Sample(seconds=0.5 * n, num_bytes=1_000_000_000 + 50_000_000 * n) for n in range(20)]
    return Measured(
        make_options(**options),
        datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
        model,
        list(runs) or [make_run(1), make_run(8), make_run(32, failed=2, errors={"HTTP 503": ErrorCount(2, "busy")})],
        samples if memory else [],
    )


JSONL = Path("prompts.jsonl")
