"""One event a period for all who listen; none for nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from server.feed import Feed, Listener

PERIOD = 0.05


class Source:
    """Numbers its events from 1. `gate` holds them up, `error` is raised instead."""

    def __init__(self) -> None:
        self.num_made = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def make(self) -> bytes:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.num_made += 1
        return b"%d" % self.num_made


def with_feed(use: Callable[[Feed, Source], Awaitable[None]], period: float = PERIOD) -> None:
    async def main() -> None:
        source = Source()
        feed = Feed(source.make, period)
        await asyncio.wait_for(use(feed, source), 10)
        await feed.close()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "something is left running"

    asyncio.run(main())


async def take(events: AsyncGenerator[bytes, None], count: int) -> list[bytes]:
    return [await anext(events) for _ in range(count)]


def test_ten_listeners_cost_one() -> None:
    async def use(feed: Feed, source: Source) -> None:
        listeners = [feed.listen() for _ in range(10)]
        begun = time.monotonic()
        found = await asyncio.gather(*(take(listener.events(), 5) for listener in listeners))
        seconds = time.monotonic() - begun
        assert found == [[b"1", b"2", b"3", b"4", b"5"]] * 10
        assert source.num_made == 5
        assert 4 * PERIOD <= seconds < 20 * PERIOD, "the first is there at once, the others come in time"

    with_feed(use)


def test_nobody_costs_nothing() -> None:
    async def use(feed: Feed, source: Source) -> None:
        await asyncio.sleep(2 * PERIOD)
        assert source.num_made == 0
        listener = feed.listen()
        await take(listener.events(), 1)
        listener.close()
        listener.close()
        assert feed.num_listeners == 0
        made = source.num_made
        await asyncio.sleep(3 * PERIOD)
        assert source.num_made == made
        assert await take(feed.listen().events(), 1) == [b"%d" % (made + 1)], "not what was made long ago"

    with_feed(use)


def test_who_comes_later_does_not_wait_for_the_next() -> None:
    async def use(feed: Feed, source: Source) -> None:
        await take(feed.listen().events(), 1)
        begun = time.monotonic()
        assert await take(feed.listen().events(), 1) == [b"1"]
        assert time.monotonic() - begun < 1
        assert source.num_made == 1

    with_feed(use, period=5)


def test_a_slow_reader_skips_events() -> None:
    async def use(feed: Feed, source: Source) -> None:
        slow, quick = feed.listen().events(), feed.listen().events()
        assert await anext(slow) == b"1"
        await take(quick, 6)
        assert await anext(slow) == b"%d" % source.num_made
        assert await anext(slow) == b"%d" % source.num_made

    with_feed(use)


def test_an_event_before_its_time() -> None:
    async def use(feed: Feed, _: Source) -> None:
        events = feed.listen().events()
        await anext(events)
        begun = time.monotonic()
        feed.hurry()
        assert await anext(events) == b"2"
        assert time.monotonic() - begun < 1

    with_feed(use, period=5)


def test_the_end_is_told() -> None:
    async def use(feed: Feed, source: Source) -> None:
        source.gate.clear()
        waiting = asyncio.create_task(take(feed.listen().events(), 1))
        await asyncio.sleep(0.01)
        await feed.close()
        assert await waiting == [b"data: [DONE]\n\n"]
        late = feed.listen().events()
        assert [event async for event in late] == [b"data: [DONE]\n\n"]
        assert source.num_made == 0

    with_feed(use)


def test_a_failure_is_everybodys_and_the_next_listener_starts_anew() -> None:
    async def use(feed: Feed, source: Source) -> None:
        listeners: list[Listener] = [feed.listen(), feed.listen()]
        source.error = ValueError("broken")
        for listener in listeners:
            async with aclosing(listener.events()) as events:
                with pytest.raises(ValueError, match="broken"):
                    await anext(events)
            listener.close()
        source.error = None
        assert await take(feed.listen().events(), 2) == [b"1", b"2"]

    with_feed(use)
