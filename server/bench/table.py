"""The figures of `bench serve` as text."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.metrics import METRICS, RunResult, Spread

_TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_COLUMNS = (
    *("streams", "req/s", "in tok/s", "out tok/s", "TTFT", "p99", "TPOT", "p99", "ITL", "p99", "E2E", "p99"),
    *("goodput", "failed", "GB"),
)
_WIDTH = 10


def describe(run: RunResult, goodput: Mapping[str, float]) -> str:
    """All figures of one run, in lines."""
    lines = [
        f"Requests               {run.completed} in {run.duration:.2f} s, {run.failed} failed",
        f"Request throughput     {run.request_throughput:.2f} requests/s",
        f"Input throughput       {run.input_throughput:.1f} tokens/s",
        f"Output throughput      {run.output_throughput:.1f} tokens/s{_counted(run)}",
    ]
    if run.cached_input_tokens:
        share = run.cached_input_tokens / run.total_input_tokens
        lines.append(f"Prefix cache           {share:.0%} of the input tokens were in it")
    if run.request_goodput is not None:
        share = run.request_goodput / run.request_throughput
        limits = " ".join(f"{metric}:{limit:g}" for metric, limit in goodput.items())
        lines.append(f"Goodput                {run.request_goodput:.2f} requests/s, {share:.0%}, within {limits}")
    if run.peak_memory_bytes is not None:
        lines.append(f"Peak memory            {run.peak_memory_bytes / 1e9:.2f} GB of the server")
    lines.append(f"Load generator         {run.client_cpu / run.duration:.0%} of a core")
    lines.append(f"{'Milliseconds':22} {'mean':>10} {'median':>10} {'p90':>10} {'p99':>10}")
    for metric in METRICS:
        spread = run.spreads[metric]
        values = ["-"] * 4 if spread is None else [f"{value:.1f}" for value in _values(spread)]
        lines.append(f"{_TITLES[metric]:22} " + " ".join(f"{value:>10}" for value in values))
    return "\n".join(lines + _errors(run))


def sweep_head() -> str:
    """What stands above the rows of a sweep."""
    head = "Latencies in milliseconds: median and 99th percentile\n"
    return head + "".join(f"{column:>{_WIDTH}}" for column in _COLUMNS)


def sweep_row(run: RunResult) -> str:
    cells = ["all" if run.max_concurrency is None else str(run.max_concurrency), f"{run.request_throughput:.2f}"]
    cells += [f"{run.input_throughput:.1f}", f"{run.output_throughput:.1f}"]
    for metric in METRICS:
        spread = run.spreads[metric]
        cells += ["-", "-"] if spread is None else [f"{spread.median:.1f}", f"{spread.p99:.1f}"]
    cells += ["-" if run.request_goodput is None else f"{run.request_goodput:.2f}", str(run.failed)]
    cells += ["-" if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e9:.2f}"]
    return "\n".join(["".join(f"{cell:>{_WIDTH}}" for cell in cells), *_errors(run)])


def _counted(run: RunResult) -> str:
    return "" if run.counted else ", taking each chunk for a token: the server does not count them"


def _errors(run: RunResult) -> list[str]:
    return [f"{error.count} failed with {kind}: {error.message}" for kind, error in run.errors.items()]


def _values(spread: Spread) -> tuple[float, ...]:
    return spread.mean, spread.median, spread.p90, spread.p99
