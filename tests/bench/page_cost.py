"""What open pages cost: decode steps with and without their event streams, in turn.

python -m tests.bench.page_cost [--batch 32] [--pages 10] [--steps 200] [--rounds 10] [--json FILE] [-- SERVER OPTIONS]

Starts `mixserve serve` with the options after `--`. A round is `batch` streamed answers of `steps` tokens, begun
together, so that every round does the same; rounds with and without pages alternate. A page here is what it is to the
server: a reader of `GET /v1/experts/events`. The step's time is the mean time between two tokens of the answers, by the
server's own count of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.running import Server, running_server

INTER_TOKEN = "mixserve_inter_token_latency_seconds"


@dataclass
class Reader:
    """One request whose answer is read and thrown away; `events` of it have come."""

    url: str
    head: str
    body: str = ""
    events: int = 0

    async def read(self, first: asyncio.Event | None = None) -> None:
        """Until the answer ends. Sets `first` when its first event has come."""
        host, port = urlsplit(self.url).hostname, urlsplit(self.url).port
        reader, writer = await asyncio.open_connection(host, port)
        try:
            length = f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n" if self.body else ""
            head = f"{self.head} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{length}\r\n"
            writer.write((head + self.body).encode())
            while line := await reader.readline():
                self.events += line.startswith(b"data: ")
                if self.events and first is not None:
                    first.set()
        finally:
            writer.close()


async def read_answers(url: str, *, batch: int, steps: int) -> None:
    """`batch` streamed answers at once. Raises AssertionError when one is cut short."""
    common = {"max_tokens": steps, "ignore_eos": True, "temperature": 0, "stream": True}
    readers = [
        Reader(url, "POST /v1/completions", json.dumps({"prompt": f"{index} stories:"} | common))
        for index in range(batch)
    ]
    await asyncio.gather(*(reader.read() for reader in readers))
    assert all(reader.events > 1 for reader in readers), "a stream was refused or broke"


@contextlib.asynccontextmanager
async def open_pages(url: str, count: int) -> AsyncIterator[list[Reader]]:
    """Event streams that all have their first event, until the block ends."""
    readers = [Reader(url, "GET /v1/experts/events") for _ in range(count)]
    started = [asyncio.Event() for _ in readers]
    reading = [asyncio.create_task(reader.read(first)) for reader, first in zip(readers, started, strict=True)]
    try:
        async with asyncio.timeout(30):
            await asyncio.gather(*(first.wait() for first in started))
        yield readers
        assert not any(task.done() for task in reading), "a page's stream ended"
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def time_round(server: Server, *, batch: int, steps: int, pages: int) -> tuple[float, int]:
    """Seconds of a mean step, and how many events the pages got in all."""
    async with open_pages(server.url, pages) as readers:
        before = [server.metric(f"{INTER_TOKEN}_{part}") for part in ("sum", "count")]
        await read_answers(server.url, batch=batch, steps=steps)
        events = sum(reader.events for reader in readers)
        after = [server.metric(f"{INTER_TOKEN}_{part}") for part in ("sum", "count")]
    seconds, count = (new - old for new, old in zip(after, before, strict=True))
    return seconds / count, events


async def measure(server: Server, *, batch: int, steps: int, pages: int, rounds: int) -> dict[str, float]:
    """Medians over `rounds` with and as many without pages, after one to warm up."""
    await read_answers(server.url, batch=batch, steps=steps)
    times: dict[bool, list[float]] = {False: [], True: []}
    events = 0
    for number in range(rounds):
        for open_ in (False, True) if number % 2 == 0 else (True, False):  # a drift meets both alike
            seconds, seen = await time_round(server, batch=batch, steps=steps, pages=pages if open_ else 0)
            times[open_].append(seconds)
            events += seen
    without, with_ = statistics.median(times[False]), statistics.median(times[True])
    return {
        "batch": batch,
        "steps": steps,
        "pages": pages,
        "rounds": rounds,
        "page_events": events,
        "without_ms": without * 1e3,
        "with_ms": with_ * 1e3,
        "with_over_without": statistics.median(b / a for a, b in zip(times[False], times[True], strict=True)),
        "without_spread": max(times[False]) / min(times[False]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="after --: options of mixserve serve")
    options = parser.parse_args(arguments)
    with running_server(*options.server, seconds=600) as server:
        figures = asyncio.run(
            measure(server, batch=options.batch, steps=options.steps, pages=options.pages, rounds=options.rounds)
        )
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
