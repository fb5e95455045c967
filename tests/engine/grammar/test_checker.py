"""Grammars of strangers: whatever one of them is, it ends as a refusal, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from engine.errors import EngineOverloadedError
from engine.grammar import GrammarError, GrammarSpec, checker
from engine.grammar.check_process import MAX_MEMORY_BYTES
from engine.grammar.checker import MAX_SECONDS, GrammarChecker
from tests.engine.engines import in_loop, until
from tests.engine.grammar.hopeless import SLOW
from tests.engine.grammar.texts import byte_vocabulary

LIMIT = 2.0
"""Seconds within which anything is answered."""


@asynccontextmanager
async def checking(*, max_model_len: int = 2048) -> AsyncIterator[GrammarChecker]:
    """A checker that is ready."""
    grammars = GrammarChecker(byte_vocabulary(), max_model_len=max_model_len)
    try:
        await grammars.check(GrammarSpec.choice(["ready"]))
        yield grammars
    finally:
        await grammars.close()


def worker(grammars: GrammarChecker) -> psutil.Process:
    """The one that is asked next."""
    assert grammars._process is not None
    return psutil.Process(grammars._process.result().pid)


async def stop(process: psutil.Process) -> None:
    """Let it hang, as far as others can see."""
    process.suspend()
    await until(lambda: process.status() == psutil.STATUS_STOPPED)


def choice(text: str) -> GrammarSpec:
    return GrammarSpec.choice([text])


@in_loop
async def test_good_grammars_and_bad_ones() -> None:
    async with checking() as grammars:
        for spec in (
            choice("a"),
            GrammarSpec.json_object(),
            GrammarSpec.regex("[a-z]+"),
            GrammarSpec.lark('start: "a"'),
        ):
            assert await grammars.check(spec) == spec.source()
        with pytest.raises(GrammarError, match="invalid regex: unclosed group"):
            await grammars.check(GrammarSpec.regex("("))
        with pytest.raises(GrammarError, match="at least 2050 characters"):
            await grammars.check(GrammarSpec.json_schema({"type": "string", "minLength": 2048}))
        with pytest.raises(GrammarError, match=r"\d+ characters long"):
            await grammars.check(choice("a" * 2**20))
        assert await grammars.check(choice("b")) == choice("b").source()


@in_loop
async def test_the_limit_is_the_context_in_bytes() -> None:
    spec = GrammarSpec.json_schema({"type": "string", "minLength": 98})
    async with checking(max_model_len=100) as grammars:
        assert await grammars.check(spec)
    async with checking(max_model_len=99) as grammars:
        with pytest.raises(GrammarError, match="at least 100 characters"):
            await grammars.check(spec)


@in_loop
async def test_a_hopeless_grammar_is_refused_in_time_and_its_process_is_gone() -> None:
    async with checking() as grammars:
        process = worker(grammars)
        begin = time.monotonic()
        with pytest.raises(GrammarError, match=r"takes more than 1\.2 seconds to compile"):
            await grammars.check(SLOW)
        assert MAX_SECONDS <= time.monotonic() - begin < LIMIT
        assert not psutil.pid_exists(process.pid), "neither alive nor a zombie"
        assert await grammars.check(choice("b")) == choice("b").source()
        assert worker(grammars).pid != process.pid


@in_loop
async def test_one_hopeless_grammar_after_another() -> None:
    """Each in time: the process for the next is started before the last one is killed."""
    async with checking() as grammars:
        for number in range(3):
            begin = time.monotonic()
            with pytest.raises(GrammarError, match="to compile"):
                await grammars.check(GrammarSpec.json_schema(json.loads(SLOW.text.replace("k1", f"x{number}"))))
            assert time.monotonic() - begin < LIMIT
            assert len(psutil.Process().children()) == 1


@in_loop
async def test_a_process_in_reserve_goes_when_it_is_not_needed() -> None:
    """The grammar came to an end in time after all."""
    async with checking() as grammars:
        first = worker(grammars)
        await stop(first)
        late = asyncio.create_task(grammars.check(choice("late")))
        await until(lambda: len(psutil.Process().children()) == 2)
        first.resume()
        assert await late == choice("late").source()
        assert worker(grammars) == first
        assert psutil.Process().children() == [first]
        assert await grammars.check(choice("next")) == choice("next").source()


def test_a_thread_could_not_be_ended() -> None:
    """What the process is for. The exception is what ends a thread of Python code, at its next instruction."""
    code = """
import ctypes, os, sys, threading
from engine.grammar.build import check
from engine.grammar.checker import MAX_SECONDS
from tests.engine.grammar.hopeless import SLOW
from tests.engine.grammar.texts import byte_vocabulary

library = byte_vocabulary().to_library()
thread = threading.Thread(target=check, args=(SLOW, library, 2048))
thread.start()
thread.join(MAX_SECONDS)
late = thread.is_alive()
ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
thread.join(1)
print(late, thread.is_alive(), flush=True)
os._exit(0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "True True\n", run.stderr


@in_loop
async def test_others_are_answered_meanwhile() -> None:
    """What is known at once, what is new after the hopeless one."""
    async with checking() as grammars:
        known = await grammars.check(choice("known"))
        hopeless = asyncio.create_task(grammars.check(SLOW))
        await asyncio.sleep(0.1)
        new = [asyncio.create_task(grammars.check(choice(text))) for text in "abc"]
        for _ in range(10):
            begin = time.monotonic()
            assert await grammars.check(choice("known")) == known
            assert time.monotonic() - begin < 0.1
            await asyncio.sleep(0.02)
        assert not hopeless.done()
        assert await asyncio.gather(*new) == [choice(text).source() for text in "abc"]
        with pytest.raises(GrammarError):
            await hopeless


@in_loop
async def test_the_event_loop_is_not_held_up() -> None:
    async with checking() as grammars:
        hopeless = asyncio.create_task(grammars.check(SLOW))
        longest, last = 0.0, time.monotonic()
        while not hopeless.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert isinstance(hopeless.exception(), GrammarError)
        assert longest < 0.5


DEEP = 60_000
TERMINALS = "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60))
BOMBS: dict[str, GrammarSpec] = {
    "a schema": GrammarSpec("json_schema", '{"items":' * DEEP + "{}" + "}" * DEEP),
    "a list": GrammarSpec("json_schema", '{"enum":' + "[" * DEEP + "]" * DEEP + "}"),
    "a regex": GrammarSpec.regex("(" * DEEP + "a" + ")" * DEEP),
    "lark": GrammarSpec.lark(f"start: {'(' * DEEP}'a'{')' * DEEP}"),
    "gbnf": GrammarSpec.lark(f'root ::= {"(" * DEEP}"a"{")" * DEEP}'),
    "rules": GrammarSpec.lark(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(8000)) + '\nr8000: "a"'
    ),
    "terminals": GrammarSpec.lark(f'start: R0\n{TERMINALS}\nR60: "a"'),
}


@pytest.mark.parametrize("spec", BOMBS.values(), ids=BOMBS)
def test_what_explodes_kills_nothing_that_matters(spec: GrammarSpec) -> None:
    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            begin = time.monotonic()
            with pytest.raises(GrammarError):
                await grammars.check(spec)
            assert time.monotonic() - begin < LIMIT
            assert await grammars.check(choice("b")) == choice("b").source()

    run()


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one takes some 80 MB, which are not there."""
    monkeypatch.setattr(checker, "MAX_SECONDS", 10.0)

    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            process = worker(grammars)
            room = process.memory_info().vms
            process.rlimit(psutil.RLIMIT_AS, (room, room))
            with pytest.raises(GrammarError, match="takes too much memory"):
                await grammars.check(BOMBS["terminals"])
            assert not psutil.pid_exists(process.pid)
            assert await grammars.check(choice("b")) == choice("b").source()
            assert worker(grammars).rlimit(psutil.RLIMIT_AS) == (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)

    run()


@in_loop
async def test_a_process_that_somebody_killed_while_it_had_nothing_to_do() -> None:
    async with checking() as grammars:
        for _ in range(3):
            process = worker(grammars)
            process.kill()
            process.wait(5)
            await asyncio.sleep(0.05)
            spec = choice(str(process.pid))
            assert await grammars.check(spec) == spec.source()


@pytest.mark.parametrize("end", [psutil.Process.kill, psutil.Process.terminate])
def test_a_process_that_somebody_killed_while_it_worked(end: Callable[[psutil.Process], None]) -> None:
    """That is not the grammar's doing: it may come again."""

    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            for text in "ab":
                await grammars.check(choice(text))
                begin = time.monotonic()
                hopeless = asyncio.create_task(grammars.check(SLOW))
                await asyncio.sleep(0.2)
                end(worker(grammars))
                with pytest.raises(EngineOverloadedError, match="was killed"):
                    await hopeless
                assert time.monotonic() - begin < MAX_SECONDS
            assert await grammars.check(choice("c")) == choice("c").source()

    run()


def slow_for(seconds: float) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run a test with another SLOW_SECONDS."""

    def decorate(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def run() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checker, "SLOW_SECONDS", seconds)
                in_loop(test)()

        return run

    return decorate


async def _refused_by_a_stopped_process(grammars: GrammarChecker, spec: GrammarSpec) -> None:
    """It takes the whole time, and the machine was at fault."""
    await stop(worker(grammars))
    with pytest.raises(GrammarError, match="to compile"):
        await grammars.check(spec)


@slow_for(0.3)
async def test_what_took_too_long_may_try_again_later() -> None:
    async with checking() as grammars:
        await _refused_by_a_stopped_process(grammars, choice("a"))
        with pytest.raises(GrammarError, match="to compile"):
            await grammars.check(choice("a"))
        await asyncio.sleep(0.4)
        assert await grammars.check(choice("a")) == choice("a").source()


@slow_for(60)
async def test_but_not_at_once() -> None:
    async with checking() as grammars:
        await _refused_by_a_stopped_process(grammars, choice("a"))
        begin = time.monotonic()
        for _ in range(20):
            with pytest.raises(GrammarError, match="to compile"):
                await grammars.check(choice("a"))
        assert time.monotonic() - begin < MAX_SECONDS


@in_loop
async def test_the_answer_to_one_that_left_is_not_the_next_ones() -> None:
    async with checking() as grammars:
        process = worker(grammars)
        await stop(process)
        first = asyncio.create_task(grammars.check(choice("first")))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(grammars.check(choice("second")))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        if process.is_running():
            process.resume()
        assert await second == choice("second").source()
        assert await grammars.check(choice("first")) == choice("first").source()


@in_loop
async def test_one_that_leaves_the_line_leaves_it_to_others() -> None:
    async with checking() as grammars:
        hopeless = asyncio.create_task(grammars.check(SLOW))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(grammars.check(choice(str(number)))) for number in range(5)]
        await asyncio.sleep(0.05)
        for task in waiting[::2]:
            task.cancel()
        hopeless.cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in done] == [True, False] * 2 + [True]
        assert done[1::2] == [choice("1").source(), choice("3").source()]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The frames that were sent to a process, as they come."""
    asked: list[bytes] = []
    ask = checker._ask

    async def spy(process: Any, frame: bytes) -> Any:
        asked.append(frame)
        return await ask(process, frame)

    monkeypatch.setattr(checker, "_ask", spy)
    return asked


def test_a_verdict_is_reached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)

    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            asked.clear()
            good = [grammars.check(choice("a")) for _ in range(20)]
            assert {*await asyncio.gather(*good)} == {choice("a").source()}
            assert await grammars.check(choice("a")) == choice("a").source()
            assert len(asked) == 1
            for _ in range(3):
                with pytest.raises(GrammarError, match="unclosed group"):
                    await grammars.check(GrammarSpec.regex("("))
            assert len(asked) == 2
            assert await grammars.check(GrammarSpec.regex("a")) == GrammarSpec.regex("a").source()
            assert await grammars.check(GrammarSpec.lark('start: "a"')) == GrammarSpec.lark('start: "a"').source()
            assert len(asked) == 4

    run()


@pytest.mark.parametrize("limits", [{"MAX_VERDICTS": 3}, {"MAX_VERDICT_BYTES": 3 * sys.getsizeof("x" * 1000) + 500}])
def test_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    """Room for three: the one that was used last goes last."""
    for name, value in limits.items():
        monkeypatch.setattr(checker, name, value)
    asked = counted(monkeypatch)
    specs = [choice(str(number) * 950) for number in range(5)]

    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            for spec in specs[:3]:
                await grammars.check(spec)
            await grammars.check(specs[0])
            asked.clear()
            await grammars.check(specs[3])
            await grammars.check(specs[0])
            await grammars.check(specs[2])
            assert len(asked) == 1
            await grammars.check(specs[1])
            assert len(asked) == 2

    run()


def test_too_many_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "MAX_WAITING", 3)

    @in_loop
    async def run() -> None:
        async with checking() as grammars:
            known = await grammars.check(choice("known"))
            hopeless = asyncio.create_task(grammars.check(SLOW))
            line = [asyncio.create_task(grammars.check(choice(text))) for text in "ab"]
            await asyncio.sleep(0.05)
            begin = time.monotonic()
            with pytest.raises(EngineOverloadedError, match="too many grammars wait"):
                await grammars.check(choice("c"))
            assert await grammars.check(choice("known")) == known
            assert time.monotonic() - begin < 0.2
            assert await asyncio.gather(*line) == [choice("a").source(), choice("b").source()]
            with pytest.raises(GrammarError):
                await hopeless
            assert await grammars.check(choice("c")) == choice("c").source()

    run()


@pytest.mark.parametrize("wait", [None, 0.0, 0.02, 0.1, 0.2, 0.5])
def test_closing_leaves_no_process(wait: float | None) -> None:
    """Before it is started, while it starts, and after; `in_loop` looks."""

    @in_loop
    async def run() -> None:
        grammars = GrammarChecker(byte_vocabulary(), max_model_len=100)
        if wait is not None:
            grammars.start()
            grammars.start()
            await asyncio.sleep(wait)
            assert len(psutil.Process().children()) <= 1
        await grammars.close()
        await grammars.close()
        with pytest.raises(EngineOverloadedError):
            await grammars.check(choice("a"))

    run()


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.1, 0.7])
def test_closing_under_load_leaves_no_process(wait: float) -> None:
    """Whoever waits is told so."""

    @in_loop
    async def run() -> None:
        grammars = GrammarChecker(byte_vocabulary(), max_model_len=100)
        waiting = [asyncio.create_task(grammars.check(spec)) for spec in (SLOW, choice("a"), choice("b"))]
        await asyncio.sleep(wait)
        await grammars.close()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in done] == [EngineOverloadedError] * 3

    run()


@in_loop
async def test_a_model_that_cannot_end() -> None:
    grammars = GrammarChecker(byte_vocabulary(ends=()), max_model_len=100)
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        await grammars.check(choice("a"))
    await grammars.close()


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request tries anew; the first to succeed is served."""
    executable = sys.executable

    @in_loop
    async def run() -> None:
        grammars = GrammarChecker(byte_vocabulary(), max_model_len=100)
        for broken in ("/bin/false", "/does/not/exist"):
            monkeypatch.setattr(sys, "executable", broken)
            with pytest.raises(EngineOverloadedError, match="does not start"):
                await grammars.check(choice("a"))
        monkeypatch.setattr(sys, "executable", executable)
        assert await grammars.check(choice("a")) == choice("a").source()
        await grammars.close()

    run()
