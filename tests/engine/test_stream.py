"""engine/stream.py: what waits to be read."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import EngineDeadError, InvalidRequestError, RequestFailedError
from engine.stream import MAX_PENDING_EVENTS, Mailbox, RequestStream, merge
from engine.types import FinishReason, TokenEvent, TokenLogprobs
from tests.engine.engines import in_loop


def test_merge() -> None:
    def logprobs(token_id: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, -0.5, 1)

    first = TokenEvent(
        request_id="a", token_ids=(5,), logprobs=(logprobs(5),), prompt_logprobs=(logprobs(1),), num_cached_tokens=16
    )
    last = TokenEvent(
        request_id="a",
        token_ids=(7, 2),
        logprobs=(logprobs(7), logprobs(2)),
        finish_reason=FinishReason.STOP,
        stop_reason=2,
    )
    assert merge([first]) is first
    assert merge([first, last]) == TokenEvent(
        request_id="a",
        token_ids=(5, 7, 2),
        logprobs=(logprobs(5), logprobs(7), logprobs(2)),
        prompt_logprobs=(logprobs(1),),
        num_cached_tokens=16,
        finish_reason=FinishReason.STOP,
        stop_reason=2,
    )
    assert merge([TokenEvent(request_id="a", token_ids=(1,)), TokenEvent(request_id="a")]).logprobs is None


@in_loop
async def test_a_mailbox_stays_small() -> None:
    mailbox = Mailbox("a")
    for i in range(10 * MAX_PENDING_EVENTS + 5):
        mailbox.put(TokenEvent(request_id="a", token_ids=(i,)))
        assert len(mailbox._events) < MAX_PENDING_EVENTS
    assert (await mailbox.take()).token_ids == tuple(range(10 * MAX_PENDING_EVENTS + 5))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(mailbox.take(), 0.01)


@in_loop
async def test_a_reader_that_waits_is_woken() -> None:
    mailbox = Mailbox("a")
    gone = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    mailbox.put(TokenEvent(request_id="a", token_ids=(1,)))  # which that reader does not get
    assert (await mailbox.take()).token_ids == (1,)
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(TokenEvent(request_id="a", token_ids=(2,)))
    mailbox.put(TokenEvent(request_id="a", token_ids=(3,)))
    mailbox.fail("it broke")
    assert (await waiting).token_ids == (2, 3)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="it broke"):
            await mailbox.take()


@in_loop
async def test_a_failure_wakes_a_reader() -> None:
    mailbox = Mailbox("a")
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.fail("it broke")
    with pytest.raises(EngineDeadError, match="it broke"):
        await asyncio.wait_for(waiting, 5)


@in_loop
async def test_an_error_that_is_the_requests_own_fault() -> None:
    for param, kind in ((None, RequestFailedError), ("grammar", InvalidRequestError)):
        mailbox = Mailbox("a")
        mailbox.put(TokenEvent(request_id="a", finish_reason=FinishReason.ERROR, error="too slow", param=param))
        with pytest.raises(kind, match="too slow"):
            await anext(RequestStream(mailbox, lambda _: None))
