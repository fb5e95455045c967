"""GrammarChecker: grammars of strangers are tried in a process of their own, killed when one takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict

import msgspec

from engine.child import child_environment
from engine.errors import EngineOverloadedError
from engine.grammar.check_process import HEADER_BYTES, Setup, Verdict, encode
from engine.grammar.errors import GrammarError
from engine.grammar.spec import MAX_SOURCE_BYTES, GrammarSpec
from engine.grammar.vocabulary import GrammarVocabulary

MAX_SECONDS = 1.2
"""For one grammar; an ordinary one takes a few milliseconds."""

MAX_WAITING = 32
"""Grammars in line; more are refused for now."""

MAX_VERDICTS = 512
MAX_VERDICT_BYTES = 32 * 2**20
"""Verdicts that are remembered, and what their texts may take together; the least recently used goes first."""

SLOW_SECONDS = 60.0
"""How long a grammar that took too long is refused unseen: a machine that was busy then may not be now."""

_START_SECONDS = 30.0

_SPARE_SECONDS = 0.2
"""After so long with one grammar, the process for the next is started: by the time it is needed, it is ready."""

_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
"""Ends of the process that are not the grammar's doing."""

_TOO_SLOW = Verdict(error=f"the grammar takes more than {MAX_SECONDS:g} seconds to compile; make it smaller")
_TOO_LARGE = Verdict(error="the grammar takes too much memory to compile; make it smaller")


class GrammarChecker:
    """One process, one grammar at a time; a verdict is reached once. To be used from one event loop."""

    def __init__(self, vocabulary: GrammarVocabulary, *, max_model_len: int) -> None:
        self._can_end = bool(vocabulary.eos_token_ids)
        self._setup = encode(Setup(vocabulary, max_chars=max_model_len * vocabulary.longest_piece()))
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.Task[Process] | None = None
        self._spare: asyncio.Task[Process] | None = None
        self._closed = False
        self._verdicts = _Verdicts()

    def start(self) -> None:
        """Have the process ready before the first grammar comes."""
        if self._process is None and not self._closed:
            self._process, self._spare = self._spare or self._start(), None

    async def check(self, spec: GrammarSpec) -> str:
        """The text of the grammar, for a request. Raises GrammarError when it cannot be used, and EngineOverloadedError
        when too many wait or the process was ended by somebody else."""
        if not self._can_end:
            raise GrammarError("this model has no end-of-sequence token, and an answer in a grammar could not end")
        if len(spec.text) > MAX_SOURCE_BYTES:
            raise GrammarError(f"the grammar is {len(spec.text)} characters long, at most {MAX_SOURCE_BYTES} are taken")
        key = hashlib.sha256(f"{spec.kind}\0{spec.text}".encode()).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            if self._num_waiting >= MAX_WAITING:
                raise EngineOverloadedError("too many grammars wait to be compiled")
            self._num_waiting += 1
            try:
                async with self._turn:
                    verdict = self._verdicts.get(key) or await self._try(spec)
            finally:
                self._num_waiting -= 1
            self._verdicts.put(key, verdict, seconds=SLOW_SECONDS if verdict is _TOO_SLOW else math.inf)
        if verdict.error is not None:
            raise GrammarError(verdict.error)
        return verdict.source

    async def close(self) -> None:
        """End all processes, for good."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            await _dismiss(process)
        await self._dismiss_spare()

    async def _try(self, spec: GrammarSpec) -> Verdict:
        """Ask the process. Should it die or take too long, that is the verdict, and the next one gets a fresh process.

        So it is when the caller leaves in between: the answer that is on its way must not be the next one's.
        """
        process = await self._ready()
        spare = asyncio.get_running_loop().call_later(_SPARE_SECONDS, self._have_spare)
        answered = False
        try:
            async with asyncio.timeout(MAX_SECONDS):
                verdict = await _verdict(process, spec)
            answered = verdict is not _TOO_LARGE
        except TimeoutError:
            return _TOO_SLOW
        finally:
            spare.cancel()
            if not answered:
                self._process = None
                await asyncio.shield(_end(process))
                self.start()
        await asyncio.shield(self._dismiss_spare())
        return verdict

    async def _ready(self) -> Process:
        self.start()
        while (starting := self._process) is not None:
            await asyncio.wait([starting])
            if starting.cancelled():
                break
            if isinstance(starting.exception(), TimeoutError | asyncio.IncompleteReadError | OSError):
                self._process = None
                raise EngineOverloadedError("the process that compiles grammars does not start")
            process = starting.result()
            if process.returncode is None:
                return process
            self._process = None  # it was ended by somebody while it had nothing to do
            self.start()
        raise EngineOverloadedError("no grammars are compiled any more")

    def _have_spare(self) -> None:
        if self._spare is None and not self._closed:
            self._spare = self._start()

    async def _dismiss_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await _dismiss(spare)

    def _start(self) -> asyncio.Task[Process]:
        return asyncio.create_task(self._spawn(), name="grammar checker")

    async def _spawn(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "engine.grammar.check_process"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env=child_environment(),
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _ask(process, self._setup)
        except BaseException:
            await _end(process)
            raise
        return process


async def _verdict(process: Process, spec: GrammarSpec) -> Verdict:
    """Of the process, or of how it ended."""
    try:
        return await _ask(process, encode(spec))
    except (asyncio.IncompleteReadError, OSError):
        if await process.wait() in _KILLED:
            raise EngineOverloadedError("the process that compiles grammars was killed") from None
        return _TOO_LARGE


async def _ask(process: Process, frame: bytes) -> Verdict:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(frame)
    await process.stdin.drain()
    header = await process.stdout.readexactly(HEADER_BYTES)
    payload = await process.stdout.readexactly(int.from_bytes(header, "little"))
    return msgspec.msgpack.decode(payload, type=Verdict)


async def _dismiss(starting: asyncio.Task[Process]) -> None:
    starting.cancel()
    (process,) = await asyncio.gather(starting, return_exceptions=True)
    if isinstance(process, Process):
        await _end(process)


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


class _Verdicts:
    """A bounded memory, least recently used first out."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[Verdict, float]] = OrderedDict()  # and until when
        self._num_bytes = 0

    def get(self, key: bytes) -> Verdict | None:
        verdict, until = self._known.get(key, (None, math.inf))
        if until < time.monotonic():
            self._drop(key)
            return None
        if verdict is not None:
            self._known.move_to_end(key)
        return verdict

    def put(self, key: bytes, verdict: Verdict, *, seconds: float) -> None:
        if key in self._known:
            return
        self._known[key] = verdict, time.monotonic() + seconds
        self._num_bytes += sys.getsizeof(verdict.source)
        while len(self._known) > MAX_VERDICTS or self._num_bytes > MAX_VERDICT_BYTES:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        verdict, _ = self._known.pop(key)
        self._num_bytes -= sys.getsizeof(verdict.source)
