"""engine/client.py: how an engine process starts, and all the ways in which it can end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from engine import client, wire
from engine.client import AsyncEngine
from engine.errors import ConfigurationError, EngineDeadError, EngineOverloadedError
from tests.engine.engines import LOST_SECONDS, SLOW, fails_with_dead, in_loop, running, tokens_of, until
from tests.engine.fake_core import CORE, Script, config_for, make_request


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
async def test_a_death_fails_open_questions() -> None:
    async with running(Script(sleep_at=1), record_routing=True) as engine:
        stream = engine.submit(make_request("a"))
        await asyncio.sleep(0.2)  # the step that has no end has begun
        questions = [asyncio.create_task(question) for question in (engine.expert_report(), engine.reset_experts())]
        await asyncio.sleep(0.1)
        assert not any(question.done() for question in questions)
        os.kill(engine.info.pid, signal.SIGKILL)
        await fails_with_dead(stream)
        for result in await asyncio.wait_for(asyncio.gather(*questions, return_exceptions=True), LOST_SECONDS):
            assert isinstance(result, EngineDeadError)
            assert str(result) == "the engine process was killed by SIGKILL"
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await engine.expert_report()


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
async def test_a_process_that_is_silent_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.8)
    monkeypatch.setattr(client, "HANG_SECONDS", 1.5)
    async with running(Script()) as engine:
        stream = engine.submit(make_request("a"))
        os.kill(engine.info.pid, signal.SIGSTOP)
        await until(lambda: not engine.healthy, 2)
        with pytest.raises(EngineOverloadedError, match="does not answer"):
            engine.submit(make_request("b"))
        assert "nothing heard" in await fails_with_dead(stream)
        assert engine.error is not None


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
    await until(lambda: threading.active_count() <= before[0] and len(asyncio.all_tasks()) <= before[1])


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
