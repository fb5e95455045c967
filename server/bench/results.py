"""All that one `bench serve` finds, as it is written to a JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from server.bench.memory import Sample
from server.bench.metrics import RunResult
from server.bench.workload import ServeOptions


@dataclass(slots=True)
class Measured:
    """What has been measured so far."""

    options: ServeOptions
    date: datetime
    model: str = ""
    runs: list[RunResult] = field(default_factory=list)
    memory: list[Sample] = field(default_factory=list)
    """Of the server, over all runs; empty where it is not sampled."""

    def to_json(self) -> dict[str, Any]:
        options = self.options
        lengths = options.lengths
        return {
            "date": self.date.isoformat(timespec="seconds"),
            "base_url": options.base_url,
            "model_id": self.model,
            "endpoint": options.endpoint,
            "dataset": str(options.dataset),
            "input_len": lengths.input_len,
            "output_len": lengths.output_len,
            "range_ratio": lengths.range_ratio,
            "prefix_len": lengths.prefix_len,
            "num_prefixes": lengths.num_prefixes,
            "ignore_eos": options.ignore_eos,
            "seed": options.seed,
            "goodput": dict(options.goodput),
            "runs": [run.to_json() for run in self.runs],
            "memory": [[round(sample.seconds, 3), sample.num_bytes] for sample in self.memory],
        }
