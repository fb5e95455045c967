"""Feed: one event a second, made once for all who listen, and only while somebody does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from server.stream import DONE

PERIOD_SECONDS = 1.0


class Feed:
    """Sends what `make` returns, a whole server-sent event, to every listener, and at its end DONE.

    A listener that is slow to take an event gets the latest one when it is ready, and none of those between: nothing
    is kept for it.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, bytes]], period: float = PERIOD_SECONDS) -> None:
        """`period` is in seconds."""
        self._make = make
        self._period = period
        self._listeners: set[Listener] = set()
        self._making: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.latest = b""
        """Empty until the first event since anybody listens."""
        self.closed = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def listen(self) -> Listener:
        """A new listener, to be closed. Its first event is the latest there is, or one that is made now."""
        listener = Listener(self, self._leave)
        self._listeners.add(listener)
        if self.latest or self.closed:
            listener.tell()
        elif self._making is None:
            self._making = asyncio.create_task(self._keep_making())
        return listener

    def hurry(self) -> None:
        """Something has happened that is worth an event before its time."""
        self._hurry.set()

    async def close(self) -> None:
        """End the streams of all listeners, and of those to come."""
        self.closed = True
        making = self._stop()
        self._tell_all()
        if making is not None:
            await asyncio.wait({making})

    async def _keep_making(self) -> None:
        try:
            while True:
                begun = time.monotonic()
                self._hurry.clear()
                self.latest = await self._make()
                self._tell_all()
                left = self._period - (time.monotonic() - begun)
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, left)):
                        await self._hurry.wait()
        except Exception as error:
            self._making, self.latest = None, b""
            for listener in self._listeners:
                listener.fail(error)

    def _tell_all(self) -> None:
        for listener in self._listeners:
            listener.tell()

    def _leave(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        if not self._listeners:
            self._stop()

    def _stop(self) -> asyncio.Task[None] | None:
        """Make no more; what was made is old by the time that somebody listens again."""
        making, self._making, self.latest = self._making, None, b""
        if making is not None:
            making.cancel()
        return making


class Listener:
    """One reader of a feed."""

    def __init__(self, feed: Feed, leave: Callable[[Listener], None]) -> None:
        self._feed = feed
        self._leave = leave
        self._news = asyncio.Event()
        self._error: Exception | None = None

    def tell(self) -> None:
        """There is a new event, or the end."""
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Raises what made the feed fail."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            if self._feed.closed:
                yield DONE
                return
            yield self._feed.latest

    def close(self) -> None:
        """Listen no more. May be called again."""
        self._leave(self)
