"""When requests are sent, on a clock that does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any, TypeVar

import pytest

from server.bench.answer import Failure, Outcome
from server.bench.load import Load, run_load
from server.bench.prompts import Prompt

PROMPTS = [Prompt(f"{number}", 1) for number in range(12)]

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when there is nothing else to do, and then at once."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def work(self, seconds: float) -> None:
        self._now += seconds

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def virtually(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


class Sender:
    """Takes `seconds` for each request, of which `work` keeps the loop busy, and notes when it was sent."""

    def __init__(self, seconds: float, *, work: float = 0.0) -> None:
        self.sent: list[float] = []
        self.running = self.most = 0
        self._seconds = seconds
        self._work = work

    async def __call__(self, prompt: Prompt) -> Outcome:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.sent.append(loop.time())
        loop.work(self._work)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self._seconds)
        self.running -= 1
        return Failure("test", str(prompt.content))


def run(sender: Sender, *, concurrency: int | None = None, rate: float | None = None, seed: int = 0) -> Load:
    ended: list[None] = []
    load = virtually(
        run_load(
            PROMPTS,
            sender,
            max_concurrency=concurrency,
            request_rate=rate,
            random=Random(seed),
            finished=lambda: ended.append(None),
        )
    )
    assert len(ended) == len(PROMPTS)
    assert load.outcomes == [Failure("test", str(number)) for number in range(12)], "in the prompts' order"
    return load


def arrivals(rate: float, seed: int) -> list[float]:
    random, times = Random(seed), [0.0]
    while len(times) < len(PROMPTS):
        times.append(times[-1] + random.expovariate(rate))
    return times


@pytest.mark.parametrize("concurrency", [1, 3, 5, 12, 20])
def test_closed_loop(concurrency: int) -> None:
    """The next one is sent when one ends, and not before."""
    sender = Sender(3)
    load = run(sender, concurrency=concurrency)
    assert sender.most == min(concurrency, 12)
    assert sender.sent == [3 * (number // concurrency) for number in range(12)]
    assert load.duration == 3 * -(-12 // concurrency)


def test_all_at_once() -> None:
    sender = Sender(3)
    assert run(sender).duration == 3
    assert sender.most == 12


@pytest.mark.parametrize("seconds", [0.001, 0.1, 60])
def test_arrivals_do_not_wait_for_answers(seconds: float) -> None:
    """They come at the times that the seed says, however slow the server is."""
    sender = Sender(seconds)
    load = run(sender, rate=40, seed=7)
    assert sender.sent == pytest.approx(arrivals(40, 7))
    assert load.duration == pytest.approx(arrivals(40, 7)[-1] + seconds)


def test_the_work_of_sending_delays_no_later_arrival() -> None:
    sender = Sender(0, work=0.01)
    run(sender, rate=40, seed=7)
    delays = [sent - due for sent, due in zip(sender.sent, arrivals(40, 7), strict=True)]
    assert min(delays) == pytest.approx(0)
    assert max(delays) < 0.03, "it does not add up"


def test_the_seed_decides_the_arrivals() -> None:
    first, second = Sender(0), Sender(0)
    run(first, rate=100, seed=1)
    run(second, rate=100, seed=2)
    assert first.sent != pytest.approx(second.sent)


def test_arrivals_are_so_many_a_second() -> None:
    random = Random(0)

    async def send(_: Prompt) -> Outcome:
        return Failure("test", "")

    load = virtually(
        run_load(PROMPTS * 1000, send, max_concurrency=None, request_rate=40, random=random, finished=lambda: None)
    )
    assert 12_000 / load.duration == pytest.approx(40, rel=0.03)


def test_arrivals_are_limited_too() -> None:
    sender = Sender(1)
    load = run(sender, rate=1000, concurrency=2)
    assert sender.most == 2
    assert load.duration == pytest.approx(6, abs=0.1)
    assert sender.sent[2] == pytest.approx(1), "it waits for an end, not for its own arrival"


def test_a_sender_that_raises_ends_the_run() -> None:
    async def broken(_: Prompt) -> Outcome:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as error:
        virtually(
            run_load(PROMPTS, broken, max_concurrency=1, request_rate=None, random=Random(0), finished=lambda: None)
        )
    assert error.value.subgroup(ZeroDivisionError) is not None
