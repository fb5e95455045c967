"""`mixserve bench offline`: prefill and decode rates of the engine alone, by batch size, in this process.

A round of batch size B runs B prompts of random token ids twice, greedily, without prefix reuse and without an end of
sequence: for one output token, and for N. Prefill is B * input length over the time of the first run, decode
B * (N - 1) over the time of the second less that of the first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypedDict

from tqdm import tqdm

from engine import LLM, SamplingParams
from server.bench.output import check_writable, write_json
from server.bench.prompts import FIRST_ID, LAST_ID

_WARM_UP_TOKENS = 4
_SMALL_BATCH, _LONG_OUTPUT, _SHORT_OUTPUT = 8, 64, 32


class Row(TypedDict):
    """Of one batch size. Rates are in tokens a second: the median, the lowest and the highest of the rounds."""

    model: str
    device: str
    dtype: str
    backend: str
    batch: int
    input_len: int
    output_len: int
    rounds: int
    prefill_tok_s: float
    prefill_tok_s_min: float
    prefill_tok_s_max: float
    decode_tok_s: float
    decode_tok_s_min: float
    decode_tok_s_max: float
    distinct_experts: float
    """Mean number of experts that a decode step reaches in a layer."""
    peak_memory_bytes: int
    """Of this process until then, or allocated on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """One command. `name` is what the rows call the model at `path`; `engine` has fields of EngineConfig."""

    path: Path
    name: str
    batches: tuple[int, ...]
    input_len: int
    output_len: int | None
    """None: 64 for a batch of up to 8, else 32."""
    rounds: int
    seed: int
    engine: Mapping[str, Any]

    def output_of(self, batch: int) -> int:
        if self.output_len is not None:
            return self.output_len
        return _LONG_OUTPUT if batch <= _SMALL_BATCH else _SHORT_OUTPUT


def bench_offline(options: OfflineOptions, *, json_file: Path | None) -> None:
    """Measure, print a line a batch size, and write the rows.

    Raises BenchError, WeightsError and ConfigurationError.
    """
    if json_file is not None:
        check_writable(json_file)
    timed = _time(options)
    experts = _distinct_experts(options)
    rows = [{**row, "distinct_experts": experts[row["batch"]]} for row in timed]
    for row in rows:
        print(
            f"mixserve B={row['batch']} prefill {row['prefill_tok_s']:.0f} tok/s "
            f"decode {row['decode_tok_s']:.1f} tok/s experts {row['distinct_experts']:.1f}"
        )
    if json_file is not None:
        write_json(json_file, rows)


def _time(options: OfflineOptions) -> list[dict[str, Any]]:
    """The rows, without what only a record of the routing can tell: keeping one takes time."""
    runner = _Runner(options, record_routing=False)
    info = runner.llm.info
    rows = []
    with tqdm(total=len(options.batches) * options.rounds, desc="Measuring", unit=" rounds", disable=None) as bar:
        for batch in options.batches:
            output_len = options.output_of(batch)
            runner.run(batch, min(_WARM_UP_TOKENS, output_len))
            prefill, decode = [], []
            for _ in range(options.rounds):
                first, whole = runner.run(batch, 1), runner.run(batch, output_len)
                prefill.append(batch * options.input_len / first)
                # Of a very small model on a busy machine, the longer run may be the faster one.
                decode.append(batch * (output_len - 1) / max(whole - first, 1e-9))
                bar.update()
            rows.append(
                {
                    "model": options.name,
                    "device": info.device,
                    "dtype": info.dtype,
                    "backend": info.backend,
                    "batch": batch,
                    "input_len": options.input_len,
                    "output_len": output_len,
                    "rounds": options.rounds,
                    **_rates("prefill_tok_s", prefill),
                    **_rates("decode_tok_s", decode),
                    "peak_memory_bytes": runner.llm.core.stats().peak_memory_bytes,
                }
            )
    return rows


def _rates(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _distinct_experts(options: OfflineOptions) -> dict[int, float]:
    """By batch size, from the same work on a second engine that records its routing."""
    _free()  # the first engine: there may be no room for both
    runner = _Runner(options, record_routing=True)
    experts = {}
    for batch in options.batches:
        runner.llm.core.reset_experts()
        runner.run(batch, options.output_of(batch))
        window = runner.llm.routing().window
        experts[batch] = window.hits[window.tokens == batch].sum(dim=-1).double().mean().item()
    return experts


def _free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


class _Runner:
    """An engine, and random prompts for it."""

    def __init__(self, options: OfflineOptions, *, record_routing: bool) -> None:
        self._input_len = options.input_len
        self._random = Random(options.seed)
        self.llm = LLM(
            str(options.path),
            max_model_len=options.input_len + max(map(options.output_of, options.batches)),
            max_num_seqs=max(options.batches),
            enable_prefix_caching=False,
            record_routing=record_routing,
            **options.engine,
        )
        self._last_id = min(LAST_ID, self.llm.info.vocab_size - 1)

    def run(self, batch: int, output_len: int) -> float:
        """The seconds that so many new prompts take."""
        prompts = [
            [self._random.randint(FIRST_ID, self._last_id) for _ in range(self._input_len)] for _ in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        start = time.perf_counter()
        self.llm.generate(prompts, params)
        return time.perf_counter() - start
