"""Real engine processes around the fake core, for tests of the client."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

import psutil
import pytest

from engine.client import AsyncEngine
from engine.errors import (
    EngineDeadError,
)
from engine.stream import RequestStream
from tests.engine.fake_core import CORE, Script, config_for

P = ParamSpec("P")
FAST = Script()
SLOW = Script(step_seconds=0.02)
LOST_SECONDS = 2.0
"""Within so long of a death, nobody waits any more."""


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own, and check that it leaves no child and no descriptor."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        num_descriptors = len(os.listdir("/proc/self/fd"))
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))
        assert psutil.Process().children(recursive=True) == []
        assert len(os.listdir("/proc/self/fd")) == num_descriptors

    return run


@asynccontextmanager
async def running(script: Script = FAST, **options: object) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config_for(script, **options), core=CORE)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token async for event in stream for token in event.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        await asyncio.sleep(0.01)


async def fails_with_dead(stream: RequestStream) -> str:
    """The message, and how the stream goes on after it: not at all."""
    with pytest.raises(EngineDeadError) as caught:
        await tokens_of(stream)
    assert [event async for event in stream] == []
    return str(caught.value)
