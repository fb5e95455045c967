"""engine/client.py and engine/stream.py: many requests on one engine process, and all the ways in which it can end."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec

import psutil
import pytest

from engine import client, wire
from engine.client import AsyncEngine
from engine.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestFailedError,
)
from engine.stream import MAX_PENDING_EVENTS, Mailbox, RequestStream, merge
from engine.types import FinishReason, TokenEvent, TokenLogprobs
from tests.engine.fake_core import BAD_PROMPT, CORE, Script, config_for, make_request

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


# Requests


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


# Ends


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (Script(raise_at=5), "the engine failed: RuntimeError: step on fire"),
        (Script(exit_at=5), "the engine process ended with exit code 3"),
        (Script(kill_at=5), "the engine process was killed by SIGKILL"),
    ],
    ids=["raises", "exits", "killed"],
)
@in_loop
async def test_a_death_in_a_step_fails_everything(script: Script, expected: str) -> None:
    async with running(script) as engine:
        streams = [engine.submit(make_request(f"r{i}", max_tokens=None)) for i in range(10)]
        began = time.monotonic()
        assert await asyncio.gather(*map(fails_with_dead, streams)) == [expected] * 10
        assert time.monotonic() - began < 0.9
        assert await engine.wait_dead() == expected
        assert engine.error == expected
        assert not engine.healthy
        assert engine.num_inflight == 0
        with pytest.raises(EngineDeadError, match=expected):
            engine.submit(make_request("b"))
        await asyncio.wait_for(engine.drain(), 1)
        engine.abort("r0")


@in_loop
async def test_kill_while_idle_and_while_computing() -> None:
    for busy in (False, True):
        async with running(Script(sleep_at=1) if busy else Script()) as engine:
            stream = engine.submit(make_request("a")) if busy else None
            dead = asyncio.create_task(engine.wait_dead())
            await asyncio.sleep(0.1)
            assert not dead.done()
            os.kill(engine.info.pid, signal.SIGKILL)
            assert await asyncio.wait_for(dead, LOST_SECONDS) == "the engine process was killed by SIGKILL"
            assert not engine.healthy
            if stream is not None:
                await fails_with_dead(stream)


@in_loop
async def test_a_finished_answer_survives_the_engine() -> None:
    async with running(Script(kill_at=3)) as engine:
        finished = engine.submit(make_request("a", first=1, max_tokens=2))
        await fails_with_dead(engine.submit(make_request("b", max_tokens=None)))
        assert await tokens_of(finished) == [1, 2]


@in_loop
async def test_a_stopped_process_is_unhealthy_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.0)
    async with running(SLOW) as engine:
        stream = engine.submit(make_request("a", max_tokens=None))
        await anext(stream)
        os.kill(engine.info.pid, signal.SIGSTOP)
        await until(lambda: not engine.healthy, client.SILENCE_SECONDS + 1)
        os.kill(engine.info.pid, signal.SIGCONT)
        await until(lambda: engine.healthy, 1.0)
        await anext(stream)
        assert engine.error is None


@in_loop
async def test_a_server_that_stalls_does_not_blame_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.0)
    async with running() as engine:
        time.sleep(client.SILENCE_SECONDS + 0.2)  # noqa: ASYNC251  the stall is the point
        assert engine.healthy
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert engine.healthy


@in_loop
async def test_a_step_without_an_end_is_ended() -> None:
    async with running(Script(sleep_at=2), step_timeout=0.4) as engine:
        began = time.monotonic()
        message = await fails_with_dead(engine.submit(make_request("a")))
        assert message == "the engine hangs: a step ran longer than 0.4 seconds"
        assert 0.4 < time.monotonic() - began < LOST_SECONDS
        assert engine.error == message
        assert not psutil.pid_exists(engine.info.pid)


@in_loop
async def test_a_process_stopped_for_longer_than_a_step_may_take_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.8)
    async with running(Script(), step_timeout=0.5) as engine:
        os.kill(engine.info.pid, signal.SIGSTOP)
        assert "nothing heard" in await asyncio.wait_for(engine.wait_dead(), 2.5)


@in_loop
async def test_slow_steps_within_the_limit_are_fine() -> None:
    async with running(Script(step_seconds=0.55), step_timeout=0.9) as engine:
        assert len(await tokens_of(engine.submit(make_request("a", max_tokens=2)))) == 2
        assert engine.healthy


@in_loop
async def test_shutdown_ends_what_is_in_flight_and_may_be_repeated() -> None:
    async with running(SLOW) as engine:
        stream = engine.submit(make_request("a", max_tokens=None))
        await anext(stream)
        began = time.monotonic()
        await asyncio.gather(engine.shutdown(), engine.shutdown())
        await engine.shutdown()
        assert time.monotonic() - began < 1
        assert await fails_with_dead(stream) == await engine.wait_dead() == "the engine was shut down"
        assert engine.error is None
        assert not engine.healthy
        assert not psutil.pid_exists(engine.info.pid)
        with pytest.raises(EngineDeadError):
            engine.submit(make_request("b"))


@in_loop
async def test_shutdown_does_not_wait_for_a_hanging_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEAVE_SECONDS", 0.2)
    async with running(Script(sleep_at=1)) as engine:
        stream = engine.submit(make_request("a"))
        await asyncio.sleep(0.1)
        await engine.shutdown()
        await fails_with_dead(stream)


@in_loop
async def test_a_cancelled_shutdown_kills() -> None:
    async with running(Script(sleep_at=1)) as engine:
        stream = engine.submit(make_request("a"))
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.shutdown(), 0.1)
        await asyncio.wait_for(fails_with_dead(stream), 1)


@in_loop
async def test_twenty_restarts_leave_nothing() -> None:
    # in_loop looks at children and descriptors; threads and tasks are seen here.
    before = threading.active_count(), len(asyncio.all_tasks())
    for i in range(20):
        async with running(Script(kill_at=2 if i % 2 else None)) as engine:
            stream = engine.submit(make_request("a", max_tokens=2))
            if i % 2:
                await fails_with_dead(stream)
            else:
                await tokens_of(stream)
    await until(lambda: (threading.active_count(), len(asyncio.all_tasks())) == before)


# Starts


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        ("configuration", ConfigurationError, "kv_cache_memory_bytes is too small"),
        ("weights", ConfigurationError, "model.safetensors: header is 3 bytes long"),
        ("crash", EngineDeadError, "the engine failed while starting: RuntimeError: device on fire"),
        ("exit", EngineDeadError, "the engine process ended with exit code 7 while starting"),
        ("kill", EngineDeadError, "the engine process was killed by SIGKILL while starting"),
    ],
)
@in_loop
async def test_a_failed_start_says_why(load: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        await AsyncEngine.start(config_for(Script(load=load)), core=CORE)
    assert str(caught.value) == message


@in_loop
async def test_a_cancelled_start_leaves_no_process() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(AsyncEngine.start(config_for(Script(load_seconds=60)), core=CORE), 0.3)


@in_loop
async def test_another_protocol_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 999)
    with pytest.raises(EngineDeadError, match=r"speaks protocol version \d+, this one 999"):
        await AsyncEngine.start(config_for(Script()), core=CORE)


def test_progress_and_prints_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    @in_loop
    async def start_and_stop() -> None:
        engine = await AsyncEngine.start(config_for(Script()), progress=True, core=CORE)
        await engine.shutdown()

    start_and_stop()
    assert capfd.readouterr() == ("", "loading\n")


def test_an_engine_folder_in_the_working_directory_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *filter(None, sys.path)])

    @in_loop
    async def start_and_stop() -> None:
        async with running():
            pass

    start_and_stop()


PARENT = """
import asyncio
from engine.client import AsyncEngine
from tests.engine.fake_core import CORE, Script, config_for, make_request

async def main():
    engine = await AsyncEngine.start(config_for(Script(sleep_at=3)), core=CORE)
    stream = engine.submit(make_request("a", max_tokens=None))
    await anext(stream)
    print(engine.info.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_engine_leaves_when_the_server_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert engine.is_running()
        parent.kill()
    deadline = time.monotonic() + 5
    # An orphan is somebody else's to reap.
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its server"
        time.sleep(0.02)


# What waits to be read


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
