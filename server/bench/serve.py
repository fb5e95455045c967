"""`mixserve bench serve`: what a server does under load, seen from outside."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from tqdm import tqdm

from server.bench.client import Client
from server.bench.errors import BenchError
from server.bench.load import Load, run_load
from server.bench.memory import MemorySampler
from server.bench.metrics import RunResult, summarize
from server.bench.output import check_writable, write_json, write_text
from server.bench.prompts import Prompt
from server.bench.report import html_report
from server.bench.results import Measured
from server.bench.table import describe, sweep_head, sweep_row
from server.bench.workload import ServeOptions, Workload, prepare

_WARM_UP_STREAMS = 8
"""Requests at once to warm up with where there is no limit."""


def bench_serve(options: ServeOptions, *, json_file: Path | None, html_file: Path | None) -> None:
    """Measure, print what was found, and write the files that are asked for.

    Raises BenchError when nothing can be measured or no request of a run has succeeded. The files then hold the runs
    before it, if there were any.
    """
    for file in (json_file, html_file):
        if file is not None:
            check_writable(file)
    measured = Measured(options, datetime.now(UTC))
    try:
        asyncio.run(_measure(measured))
    finally:
        if measured.runs and json_file is not None:
            write_json(json_file, measured.to_json())
        if measured.runs and html_file is not None:
            write_text(html_file, html_report(measured))


async def _measure(measured: Measured) -> None:
    options = measured.options
    async with AsyncExitStack() as stack:
        client = Client(options.base_url, options.api_key)
        stack.callback(client.close)
        workload = await prepare(client, options, _notice)
        measured.model = workload.target.model
        sampler = None
        if options.server_pid is not None:
            sampler = await stack.enter_async_context(MemorySampler(options.server_pid))
            measured.memory = sampler.samples
        is_sweep = len(options.concurrencies) > 1
        if is_sweep:
            print(sweep_head(), flush=True)
        for number, concurrency in enumerate(options.concurrencies):
            result = await _run(client, workload, options, number, concurrency, sampler)
            if not result.completed:
                kind, error = next(iter(result.errors.items()))
                raise BenchError(f"all {result.failed} requests failed: {kind}: {error.message}")
            measured.runs.append(result)
            print(sweep_row(result) if is_sweep else describe(result, options.goodput), flush=True)


async def _run(
    client: Client,
    workload: Workload,
    options: ServeOptions,
    number: int,
    concurrency: int | None,
    sampler: MemorySampler | None,
) -> RunResult:
    """Warm up, then measure run `number`."""

    async def send_all(prompts: list[Prompt], rate: float | None, name: str) -> Load:
        with tqdm(total=len(prompts), desc=name, unit=" requests", disable=None, leave=False) as bar:
            return await run_load(
                prompts,
                lambda prompt: client.generate(workload.target, prompt),
                max_concurrency=concurrency,
                request_rate=rate,
                random=Random(f"{options.seed} arrivals {number}"),
                finished=bar.update,
            )

    streams = "" if concurrency is None else f", {concurrency} at a time"
    await send_all(workload.warm_up.take(concurrency or _WARM_UP_STREAMS), None, f"Warming up{streams}")
    prompts = workload.dataset.take(options.num_prompts or workload.num_prompts(concurrency))
    first_sample = len(sampler.samples) if sampler else 0
    cpu = time.process_time()
    load = await send_all(prompts, options.request_rate, f"Measuring{streams}")
    cpu = time.process_time() - cpu
    if sampler is not None:
        await sampler.sample()
    return summarize(
        [(prompt.num_tokens, outcome) for prompt, outcome in zip(prompts, load.outcomes, strict=True)],
        duration=load.duration,
        goodput=options.goodput,
        max_concurrency=concurrency,
        request_rate=options.request_rate,
        client_cpu=cpu,
        peak_memory_bytes=sampler.peak(first_sample) if sampler else None,
    )


def _notice(text: str) -> None:
    print(f"mixserve: {text}", file=sys.stderr)
