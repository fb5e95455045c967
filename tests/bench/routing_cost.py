"""What observing the routing costs: decode steps with and without the record, in turn, and the record's own time.

python tests/bench/routing_cost.py CHECKPOINT [--batch 32] [--steps 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.executor import LocalExecutor
from engine.routing.record import RoutingRecord
from engine.startup import start
from engine.types import Request, SamplingParams


@dataclass
class Stopwatch:
    """Adds up the time spent in what it wraps."""

    seconds: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


class TimedRecord(RoutingRecord):
    """A record whose writes and reductions are timed."""

    def time_with(self, watch: Stopwatch) -> None:
        self.write = watch.around(super().write)  # type: ignore[method-assign]
        self.reduce = watch.around(super().reduce)  # type: ignore[method-assign]


def measure(model: str, *, batch: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a decode step of `batch` sequences, off and on, and the record's own share."""
    executor, info = start(EngineConfig(model=model, max_model_len=64 + 2 * steps, record_routing=True))
    assert isinstance(executor, LocalExecutor)
    runner = executor.runner
    assert runner.record is not None
    watch = Stopwatch()
    record = TimedRecord(
        num_layers=info.num_layers,
        num_experts=info.num_experts,
        top_k=info.num_experts_per_tok,
        max_tokens=info.max_num_batched_tokens,
        device=runner.model.backend.device,
    )
    record.time_with(watch)
    core = EngineCore(executor, info)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    for index in range(batch):
        ids = tuple((index * 131 + position * 17) % info.vocab_size for position in range(16))
        core.add(Request(request_id=str(index), prompt_ids=ids, params=params))
    while core.stats().num_waiting or core.stats().generation_tokens < batch:
        core.step()
    times: dict[bool, list[float]] = {False: [], True: []}
    own: list[float] = []
    for step in range(steps):
        on = step % 2 == 1
        runner.record = record if on else None
        watch.seconds, begin = 0.0, time.perf_counter()
        core.step()
        times[on].append(time.perf_counter() - begin)
        if on:
            own.append(watch.seconds / times[on][-1])
    off, on_ = statistics.median(times[False]), statistics.median(times[True])
    return {
        "batch": batch,
        "steps": steps,
        "off_ms": off * 1e3,
        "on_ms": on_ * 1e3,
        "on_over_off": on_ / off,
        "own_share": statistics.median(own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.model, batch=arguments.batch, steps=arguments.steps)
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
