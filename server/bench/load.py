"""When requests are sent: so many at once, or as they arrive by chance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random

from server.bench.answer import Outcome
from server.bench.prompts import Prompt

Send = Callable[[Prompt], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Load:
    """What became of every prompt, in their order, and the seconds from the first request to the end of the last."""

    outcomes: list[Outcome]
    duration: float


async def run_load(
    prompts: Sequence[Prompt],
    send: Send,
    *,
    max_concurrency: int | None,
    request_rate: float | None,
    random: Random,
    finished: Callable[[], object],
) -> Load:
    """Send every prompt; `finished` is called after each.

    Closed loop: with `max_concurrency` alone, the next request is sent when one ends. Open loop: with `request_rate`
    requests arrive by chance (a Poisson process of so many a second), however many are running, but those over
    `max_concurrency` wait. With neither, all are sent at once.
    """
    slots = asyncio.Semaphore(max_concurrency or len(prompts))

    async def one(prompt: Prompt) -> Outcome:
        async with slots:
            outcome = await send(prompt)
        finished()
        return outcome

    clock = asyncio.get_running_loop().time
    start = clock()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt)) async for prompt in _arrivals(prompts, request_rate, random)]
    return Load([task.result() for task in tasks], clock() - start)


async def _arrivals(prompts: Sequence[Prompt], request_rate: float | None, random: Random) -> AsyncIterator[Prompt]:
    """Each prompt when it is due: the first at once, the others after intervals of an exponential distribution."""
    clock = asyncio.get_running_loop().time
    due = clock()
    for prompt in prompts:
        if request_rate is not None:
            # Counted from the start, not from the last arrival, so that no delay adds up.
            await asyncio.sleep(max(0.0, due - clock()))
            due += random.expovariate(request_rate)
        yield prompt
