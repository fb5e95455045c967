"""engine/client.py: many requests on one engine process, and those that are given up."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from engine.client import AsyncEngine
from engine.errors import (
    ContextLengthError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestFailedError,
)
from engine.stream import RequestStream
from engine.types import FinishReason, TokenEvent
from tests.engine.engines import SLOW, in_loop, running, tokens_of, until
from tests.engine.fake_core import BAD_PROMPT, Script, make_report, make_request


@in_loop
async def test_fifty_streams_at_once() -> None:
    async with running() as engine:
        assert engine.healthy
        assert engine.info.vocab_size == 1000
        streams = [engine.submit(make_request(f"r{i}", first=10 * i, max_tokens=1 + i)) for i in range(50)]
        assert engine.num_inflight == 50
        texts = await asyncio.gather(*map(tokens_of, streams))
        assert texts == [[(10 * i + j) % 1000 for j in range(1 + i)] for i in range(50)]
        assert engine.num_inflight == 0
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.num_preemptions == 0
        assert engine.healthy


@in_loop
async def test_the_last_event_and_only_that_has_a_finish_reason() -> None:
    async with running(SLOW) as engine:
        events = [event async for event in engine.submit(make_request("a", max_tokens=3))]
        assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]


@in_loop
async def test_an_id_can_come_back_after_the_end() -> None:
    async with running() as engine:
        for first in (5, 6):
            assert await tokens_of(engine.submit(make_request("a", first=first, max_tokens=1))) == [first]


@in_loop
async def test_an_id_in_flight_is_refused() -> None:
    async with running(SLOW) as engine:
        stream = engine.submit(make_request("a", max_tokens=5))
        with pytest.raises(InvalidRequestError, match="in flight") as caught:
            engine.submit(make_request("a"))
        assert caught.value.param == "request_id"
        assert len(await tokens_of(stream)) == 5


@in_loop
async def test_an_aborted_id_cannot_come_back_before_the_engine_has_let_go_of_it() -> None:
    async with running(Script(step_seconds=0.3)) as engine:
        stream = engine.submit(make_request("a", first=100, max_tokens=None))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(InvalidRequestError):
            engine.submit(make_request("a"))
        assert engine.num_inflight == 1
        await until(lambda: engine.num_inflight == 0)
        assert await tokens_of(engine.submit(make_request("a", first=7, max_tokens=2))) == [7, 8]


@in_loop
async def test_an_aborted_request_is_not_delivered_to_though_the_engine_finishes_it() -> None:
    async with running(Script(step_seconds=0.2)) as engine:
        stream = engine.submit(make_request("a", max_tokens=2))
        await anext(stream)
        await asyncio.sleep(0.1)  # the engine is in its second and last step for it
        engine.abort("a")
        await until(lambda: engine.num_inflight == 0)
        assert engine.stats.num_steps == 2
        assert [event async for event in stream] == [TokenEvent(request_id="a", finish_reason=FinishReason.ABORT)]


@in_loop
async def test_validation_is_synchronous_and_costs_nothing() -> None:
    async with running(max_model_len=16) as engine:
        with pytest.raises(ContextLengthError):
            engine.submit(make_request("a", num_prompt=15, max_tokens=2))
        with pytest.raises(InvalidRequestError):
            engine.submit(make_request("a", first=1000))
        assert engine.num_inflight == 0
        assert len(await tokens_of(engine.submit(make_request("a", num_prompt=15, max_tokens=1)))) == 1


@in_loop
async def test_one_failed_request_is_its_own() -> None:
    async with running(SLOW) as engine:
        good = engine.submit(make_request("good", max_tokens=10))
        bad = engine.submit(make_request("bad", first=BAD_PROMPT))
        with pytest.raises(RequestFailedError, match="sampling failed"):
            await tokens_of(bad)
        assert [event async for event in bad] == []
        assert len(await tokens_of(good)) == 10
        assert engine.healthy


@in_loop
async def test_a_full_queue_refuses() -> None:
    async with running(SLOW, max_num_seqs=2, max_num_queued_requests=1) as engine:
        streams = [engine.submit(make_request(f"r{i}", max_tokens=5)) for i in range(3)]
        with pytest.raises(EngineOverloadedError, match="3 requests") as caught:
            engine.submit(make_request("r3"))
        assert caught.value.retry_after >= 1
        assert [len(tokens) for tokens in await asyncio.gather(*map(tokens_of, streams))] == [5, 5, 5]
        assert len(await tokens_of(engine.submit(make_request("r3")))) == 4


@in_loop
async def test_drain_finishes_what_runs_and_takes_no_more() -> None:
    async with running(SLOW) as engine:
        stream = engine.submit(make_request("a", max_tokens=10))
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloadedError, match="shutting down"):
            engine.submit(make_request("b"))
        await asyncio.sleep(0.05)
        assert not draining.done()
        assert len(await tokens_of(stream)) == 10
        await asyncio.wait_for(draining, 1)
        await engine.drain()


@in_loop
async def test_a_slow_reader_gets_everything_in_few_events() -> None:
    async with running() as engine:
        stream = engine.submit(make_request("a", first=0, max_tokens=500))
        await until(lambda: engine.num_inflight == 0)
        events = [event async for event in stream]
        assert len(events) == 1
        assert events[0].token_ids == tuple(range(500))
        assert events[0].finish_reason is FinishReason.LENGTH


# Requests that are given up


async def close(_: AsyncEngine, stream: RequestStream) -> None:
    await stream.aclose()
    await stream.aclose()
    assert [event async for event in stream] == []


async def cancel(_: AsyncEngine, stream: RequestStream) -> None:
    task = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stream.aclose()


async def abort_by_id(engine: AsyncEngine, stream: RequestStream) -> None:
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    events = [event async for event in stream]
    assert events[-1].finish_reason is FinishReason.ABORT
    await stream.aclose()


@pytest.mark.parametrize("give_up", [close, cancel, abort_by_id])
@in_loop
async def test_giving_up_aborts_once(
    give_up: Callable[[AsyncEngine, RequestStream], Coroutine[Any, Any, None]],
) -> None:
    async with running(SLOW) as engine:
        other = engine.submit(make_request("other", max_tokens=20))
        stream = engine.submit(make_request("a", max_tokens=None))
        await anext(stream)
        await give_up(engine, stream)
        await until(lambda: engine.num_inflight == 1, 1.0)
        assert len(await tokens_of(other)) == 20
        assert engine.stats.num_preemptions == 1
        assert engine.stats.num_running == 0


@pytest.mark.parametrize("in_thread", [False, True])
@in_loop
async def test_a_dropped_stream_aborts_once(in_thread: bool) -> None:
    async with running(SLOW) as engine:
        streams = [engine.submit(make_request(f"r{i}", max_tokens=None)) for i in range(3)]
        streams.append(engine.submit(make_request("ends", max_tokens=1)))
        await tokens_of(streams[-1])
        await anext(streams[0])
        if in_thread:
            thread = threading.Thread(target=streams.clear)
            thread.start()
            await asyncio.to_thread(thread.join)
        else:
            streams.clear()
        gc.collect()
        await until(lambda: engine.num_inflight == 0, 1.0)
        assert engine.stats.num_preemptions == 3
        assert engine.stats.num_running == 0


@in_loop
async def test_closing_after_the_end_aborts_nothing() -> None:
    async with running() as engine:
        read, unread = (engine.submit(make_request(name, max_tokens=1)) for name in "ab")
        await tokens_of(read)
        await until(lambda: engine.num_inflight == 0)
        await read.aclose()
        await unread.aclose()
        await tokens_of(engine.submit(make_request("c")))
        assert engine.stats.num_preemptions == 0


@in_loop
async def test_giving_up_before_the_first_step_and_all_at_once() -> None:
    async with running(SLOW) as engine:
        for round_ in range(3):
            streams = [engine.submit(make_request(f"{round_}-{i}", max_tokens=None)) for i in range(50)]
            await asyncio.gather(*(stream.aclose() for stream in streams))
            await until(lambda: engine.num_inflight == 0, 1.0)
        assert engine.stats.num_running == 0
        assert engine.stats.num_preemptions == 150


# Questions about experts


@in_loop
async def test_questions_beside_requests() -> None:
    async with running(SLOW, record_routing=True) as engine:
        assert await engine.expert_report() == make_report(0)
        stream = engine.submit(make_request("a", max_tokens=20))
        await anext(stream)
        reports, what_if = await asyncio.gather(
            asyncio.gather(*(engine.expert_report() for _ in range(5))), engine.capacity_what_if(0.5)
        )
        assert all(report.total.steps >= 1 for report in reports)
        assert (what_if.capacity_factor, what_if.total_overflow) == (0.5, ((3, 0),))
        assert len(await tokens_of(stream)) == 19
        await until(lambda: engine.num_inflight == 0)
        assert await engine.reset_experts() == make_report(20)
        assert await engine.expert_report() == make_report(0)


@in_loop
async def test_questions_without_a_record_are_refused() -> None:
    async with running() as engine:
        for question in (engine.expert_report(), engine.capacity_what_if(1.0), engine.reset_experts()):
            with pytest.raises(InvalidRequestError, match="does not record routing"):
                await question
        with pytest.raises(InvalidRequestError) as caught:
            engine.submit(replace(make_request("a"), trace_routing=True))
        assert caught.value.param == "routing"
        assert engine.healthy


@in_loop
async def test_a_question_that_nobody_waits_for_any_more_harms_nothing() -> None:
    async with running(Script(step_seconds=0.2), record_routing=True) as engine:
        stream = engine.submit(make_request("a", max_tokens=3))
        await anext(stream)
        await asyncio.sleep(0.1)  # the engine is in its second step and will answer after it
        question = asyncio.create_task(engine.expert_report())
        await asyncio.sleep(0)
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        assert len(await tokens_of(stream)) == 2
        assert (await engine.expert_report()).total.steps == 3
        assert engine.healthy
