"""Row H18: a full queue, beside streams that run. Who is refused knows it at once; who runs does not notice."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import httpx2
import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import Live, error_of, live_server, parse_events

RUNNING, WAITING, REFUSED, AT_ONCE = 4, 8, 200, 10
QUICK = 0.1
"""Seconds for half of the refusals, on a busy machine and with the clients in the server's own process."""
LONG = {"prompt": "Hi", "max_tokens": 240, "ignore_eos": True, "stream": True}


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    info = fake_info(max_num_seqs=RUNNING)
    with live_server(lambda: FakeEngine(lambda _: range(100, 400), info=info, max_waiting=WAITING), tokenizer) as live:
        yield live


class Stream(Thread):
    """One client of one stream."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx2.Client(base_url=self._live.url, timeout=60) as client:
            self.events = parse_events(client.post("/v1/completions", json=LONG).content)

    @property
    def text(self) -> str:
        *chunks, last = self.events
        assert last == "[DONE]"
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


async def refuse(live: Live, body: dict[str, Any]) -> list[float]:
    """The seconds that each of REFUSED refusals took, AT_ONCE at a time."""
    seconds = []
    async with httpx2.AsyncClient(base_url=live.url, timeout=20) as client:

        async def one_after_the_other() -> None:
            for _ in range(REFUSED // AT_ONCE):
                start = time.monotonic()
                response = await client.post("/v1/completions", json=body)
                seconds.append(time.monotonic() - start)
                assert error_of(response, 503)["code"] == "server_overloaded"
                assert int(response.headers["retry-after"]) >= 1

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return seconds


def set_pace(live: Live, step_seconds: float) -> None:
    live.call(lambda: setattr(live.engine, "step_seconds", step_seconds))


def wait_for(live: Live, num_running: int, num_waiting: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        stats = live.call(lambda: live.engine.stats)
        if (stats.num_running, stats.num_waiting) == (num_running, num_waiting):
            return
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def wait_until_idle(live: Live) -> None:
    deadline = time.monotonic() + 10
    while live.call(lambda: live.service.num_inflight):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(live: Live, stream: bool) -> None:
    alone = Stream(live)
    alone.join(30)
    set_pace(live, 0.03)
    streams = [Stream(live) for _ in range(RUNNING)]
    wait_for(live, RUNNING, 0)
    streams += [Stream(live) for _ in range(WAITING)]
    wait_for(live, RUNNING, WAITING)
    before = live.call(lambda: live.engine.stats.generation_tokens)
    seconds = asyncio.run(refuse(live, LONG | {"stream": stream}))
    stats = live.call(lambda: live.engine.stats)
    assert (stats.num_running, stats.num_waiting) == (RUNNING, WAITING), "full all the while"
    assert stats.generation_tokens > before, "and running"
    set_pace(live, 0.0)
    assert len(seconds) == REFUSED
    assert statistics.median(seconds) < QUICK
    for client in streams:
        client.join(60)
        assert client.text == alone.text
    wait_until_idle(live)  # a client may have its last byte before the server has counted it
    rejected = 'mixserve_requests_rejected_total{model_name="org/fake-model",reason="server_overloaded"}'
    assert f"{rejected} {REFUSED}.0" in live.client.get("/metrics").text


def test_a_server_that_leaves(live: Live) -> None:
    set_pace(live, 0.03)
    streams = [Stream(live) for _ in range(RUNNING)]
    wait_for(live, RUNNING, 0)
    live.call(lambda: setattr(live.service, "draining", True))
    assert statistics.median(asyncio.run(refuse(live, LONG))) < QUICK
    assert live.client.get("/health").status_code == 200
    set_pace(live, 0.0)
    for client in streams:
        client.join(60)
        assert client.events[-1] == "[DONE]"
    assert len({client.text for client in streams}) == 1
