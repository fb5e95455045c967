"""Routing statistics as the server keeps them: counters that only grow, and scrapes that do not wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from engine.errors import EngineDeadError
from server.experts import ExpertCounts, Experts, ExpertScrape
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.fake_routing import fake_routing

INFO = fake_info()

T = TypeVar("T")


def with_engine(use: Callable[[FakeEngine, Experts], Awaitable[T]], *, record: bool = True) -> T:
    async def main() -> T:
        engine = FakeEngine(lambda _: [], info=replace(INFO, record_routing=record))
        return await asyncio.wait_for(use(engine, Experts(engine)), 10)

    return asyncio.run(main())


def work(engine: FakeEngine, *tokens: int) -> None:
    engine.routed += [fake_routing(token, INFO) for token in tokens]


async def scraped(experts: Experts) -> ExpertScrape:
    scrape = await experts.scrape()
    assert scrape is not None
    return scrape


def test_counters_go_on_after_resets() -> None:
    async def use(engine: FakeEngine, experts: Experts) -> None:
        work(engine, 0, 0, 1)
        before = (await scraped(experts)).counts
        assert before == ExpertCounts(((2, 3, 1, 0, 0, 0, 0, 0), (0, 2, 3, 1, 0, 0, 0, 0)), (1, 2))
        await experts.reset()
        assert (await experts.report()).total.tokens == 0, "people see a fresh start"
        scrape = await scraped(experts)
        assert scrape.counts == before
        assert scrape.window.tokens == 0
        work(engine, 7)
        after = ExpertCounts(((3, 3, 1, 0, 0, 0, 0, 1), (1, 3, 3, 1, 0, 0, 0, 0)), (2, 4))
        assert (await scraped(experts)).counts == after
        await experts.reset()
        await experts.reset()
        assert (await scraped(experts)).counts == after

    with_engine(use)


def test_counters_never_go_backwards_while_scrapes_and_resets_mix() -> None:
    """The engine answers late and at any time; a scrape that began before a reset must not be added to what it kept."""

    async def use(engine: FakeEngine, experts: Experts) -> None:
        seen: list[int] = []

        async def scrape() -> None:
            for _ in range(30):
                await asyncio.sleep(0.001)
                seen.append(sum((await scraped(experts)).counts.dispatched[0]))

        async def reset() -> None:
            for _ in range(20):
                await asyncio.sleep(0.002)
                await experts.reset()

        async def pause() -> None:
            for _ in range(20):
                engine.pause()
                await asyncio.sleep(0.002)
                engine.resume()
                work(engine, 3)
                await asyncio.sleep(0.001)

        await asyncio.gather(scrape(), scrape(), reset(), pause())
        assert seen == sorted(seen)
        assert sum((await scraped(experts)).counts.dispatched[0]) == 40

    with_engine(use)


def test_a_failed_reset_adds_nothing() -> None:
    async def use(engine: FakeEngine, experts: Experts) -> None:
        work(engine, 1)
        engine.die("gone")
        with pytest.raises(EngineDeadError):
            await experts.reset()
        engine.error = None
        assert sum((await scraped(experts)).counts.dispatched[0]) == 2

    with_engine(use)


def test_a_scrape_does_not_wait_for_long() -> None:
    async def use(engine: FakeEngine, experts: Experts) -> None:
        engine.pause()
        start = time.monotonic()
        resetting = asyncio.create_task(experts.reset())  # holds the lock
        assert list(await asyncio.gather(experts.scrape(0.05), experts.scrape(0.05))) == [None, None]
        assert 0.04 < time.monotonic() - start < 1
        engine.resume()
        await resetting
        assert await experts.scrape() is not None

    with_engine(use)


@pytest.mark.parametrize("state", ["dead", "silent"])
def test_nobody_asks_an_engine_that_is_not_well(state: str) -> None:
    async def use(engine: FakeEngine, experts: Experts) -> None:
        engine.pause()
        if state == "dead":
            engine.die("gone")
        engine.silent = True
        start = time.monotonic()
        assert await experts.scrape() is None
        assert time.monotonic() - start < 0.5

    with_engine(use)


def test_nothing_is_scraped_where_nothing_is_recorded() -> None:
    async def use(_: FakeEngine, experts: Experts) -> None:
        assert await experts.scrape() is None

    with_engine(use, record=False)
