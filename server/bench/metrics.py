"""From the answers of one run to its figures. Definitions and names as in `vllm bench serve`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.bench.answer import Answer, Failure, Outcome
from server.percentile import percentile

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, time per output token, inter-token latency, end-to-end latency."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many values of one metric, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class ErrorCount:
    count: int
    message: str
    """Of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The figures of one run. A rate is over the seconds from the first request to the end of the last answer."""

    max_concurrency: int | None
    request_rate: float | None
    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    cached_input_tokens: int
    """Of the input, what the server had in its prefix cache."""
    counted: bool
    """Whether the server has counted the output tokens of all answers."""
    request_goodput: float | None
    """Requests a second within all limits; None without limits."""
    spreads: Mapping[str, Spread | None]
    """By metric; None when no answer has it, as TPOT for answers of one token."""
    errors: Mapping[str, ErrorCount]
    client_cpu: float
    """Seconds of processor time that the load generator took."""
    peak_memory_bytes: int | None = None

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def input_throughput(self) -> float:
        return self.total_input_tokens / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration

    def to_json(self) -> dict[str, Any]:
        """Flat, with the names of `vllm bench serve` where it has one."""
        fields: dict[str, Any] = {
            "max_concurrency": self.max_concurrency,
            "request_rate": self.request_rate,
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "cached_input_tokens": self.cached_input_tokens,
            "output_tokens_counted_by": "server" if self.counted else "chunks",
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "input_throughput": self.input_throughput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.input_throughput + self.output_throughput,
        }
        for metric, spread in self.spreads.items():
            for name in ("mean", "median", "p90", "p99"):
                fields[f"{name}_{metric}_ms"] = None if spread is None else getattr(spread, name)
        fields["errors"] = {kind: asdict(error) for kind, error in self.errors.items()}
        fields["client_cpu_seconds"] = self.client_cpu
        fields["peak_memory_bytes"] = self.peak_memory_bytes
        return fields


def summarize(
    outcomes: Sequence[tuple[int | None, Outcome]],
    *,
    duration: float,
    goodput: Mapping[str, float],
    max_concurrency: int | None,
    request_rate: float | None,
    client_cpu: float,
    peak_memory_bytes: int | None,
) -> RunResult:
    """The figures of a run of `duration` seconds. `outcomes` come with the prompts' lengths, which count where the
    server does not say them; `goodput` has limits in milliseconds by metric."""
    answers = [(length, outcome) for length, outcome in outcomes if isinstance(outcome, Answer)]
    failures = [outcome for _, outcome in outcomes if isinstance(outcome, Failure)]
    counts = Counter(failure.kind for failure in failures)
    first = {failure.kind: failure.message for failure in reversed(failures)}
    good = sum(_is_good(answer, goodput) for _, answer in answers)
    return RunResult(
        max_concurrency=max_concurrency,
        request_rate=request_rate,
        duration=duration,
        completed=len(answers),
        failed=len(failures),
        total_input_tokens=sum(
            answer.input_tokens if answer.input_tokens is not None else length or 0 for length, answer in answers
        ),
        total_output_tokens=sum(answer.output_tokens for _, answer in answers),
        cached_input_tokens=sum(answer.cached_tokens for _, answer in answers),
        counted=all(answer.counted for _, answer in answers),
        request_goodput=good / duration if goodput else None,
        spreads={
            "ttft": spread(answer.ttft for _, answer in answers),
            "tpot": spread(answer.tpot for _, answer in answers if answer.tpot is not None),
            "itl": spread(itl for _, answer in answers for itl in answer.itls),
            "e2el": spread(answer.latency for _, answer in answers),
        },
        errors={kind: ErrorCount(count, first[kind]) for kind, count in counts.most_common()},
        client_cpu=client_cpu,
        peak_memory_bytes=peak_memory_bytes,
    )


def spread(seconds: Iterable[float]) -> Spread | None:
    """In milliseconds; None of nothing."""
    values = sorted(1000 * value for value in seconds)
    if not values:
        return None
    return Spread(
        mean=math.fsum(values) / len(values),
        median=percentile(values, 50),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
    )


def _is_good(answer: Answer, goodput: Mapping[str, float]) -> bool:
    found = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.latency}
    return all(1000 * found[metric] <= limit for metric, limit in goodput.items())
