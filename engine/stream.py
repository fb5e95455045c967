"""The events of one request, between the task that reads the engine's socket and the one that answers a client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from engine.errors import EngineDeadError, InvalidRequestError, RequestFailedError
from engine.types import FinishReason, TokenEvent

_Item = TypeVar("_Item")

MAX_PENDING_EVENTS = 64
"""Events that pile up for a slow reader before they are merged into one."""


class RequestStream(AsyncIterator[TokenEvent]):
    """The events of one request, for one reader. The last has a `finish_reason`; what piled up comes merged into one.

    Raises RequestFailedError when the request failed, InvalidRequestError when that was its own fault, and
    EngineDeadError when the engine did. Before the end, closing it, cancelling a task that waits for its next event, or
    dropping the last reference to it aborts the request.
    """

    def __init__(self, mailbox: Mailbox, abandon: Callable[[Mailbox], None]) -> None:
        self._mailbox = mailbox
        self._abandon = abandon
        self._loop = asyncio.get_running_loop()
        self._done = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._done:
            raise StopAsyncIteration
        try:
            event = await self._mailbox.take()
        except BaseException:  # cancelled, or the engine died
            self._close()
            raise
        self._done = event.finish_reason is not None
        if event.finish_reason is FinishReason.ERROR:
            message = event.error or "the request failed"
            raise (
                RequestFailedError(message) if event.param is None else InvalidRequestError(message, param=event.param)
            )
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has ended. May be called again."""
        self._close()

    def _close(self) -> None:
        self._done = True
        self._abandon(self._mailbox)

    def __del__(self) -> None:
        if not self._done:
            # The garbage collector may run in any thread, and after the loop was closed.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._abandon, self._mailbox)


class Mailbox:
    """Events not yet taken. They merge when they pile up: a slow reader costs the size of its tokens, no more."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.aborted = False
        self._events: list[TokenEvent] = []
        self._failure: str | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if len(self._events) >= MAX_PENDING_EVENTS:
            self._events = [merge(self._events)]
        self._wake()

    def abort(self) -> None:
        self.aborted = True
        self.put(TokenEvent(request_id=self.request_id, finish_reason=FinishReason.ABORT))

    def fail(self, message: str) -> None:
        self._failure = message
        self._wake()

    async def take(self) -> TokenEvent:
        """All that is there, as one event; waits for some. Raises EngineDeadError after the last one."""
        while not self._events:
            if self._failure is not None:
                raise EngineDeadError(self._failure)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = merge(self._events)
        self._events = []
        return event

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def merge(events: list[TokenEvent]) -> TokenEvent:
    """Consecutive events of one request as one: token ids (5), then (7, 2) become (5, 7, 2)."""
    first, last = events[0], events[-1]
    if first is last:
        return first
    return TokenEvent(
        request_id=first.request_id,
        token_ids=tuple(itertools.chain.from_iterable(event.token_ids for event in events)),
        logprobs=_joined([event.logprobs for event in events]),
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None),
        num_cached_tokens=max(event.num_cached_tokens for event in events),
        routing=_joined([event.routing for event in events]),
        prompt_routing=next((event.prompt_routing for event in events if event.prompt_routing is not None), None),
        expert_visits=last.expert_visits,
        queue_seconds=next((event.queue_seconds for event in events if event.queue_seconds is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        param=last.param,
    )


def _joined(parts: Sequence[tuple[_Item, ...] | None]) -> tuple[_Item, ...] | None:
    """All items of the parts that are there; None when none is."""
    if all(part is None for part in parts):
        return None
    return tuple(itertools.chain.from_iterable(part or () for part in parts))
