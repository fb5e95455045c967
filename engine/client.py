"""AsyncEngine: the engine as the server sees it. Owns the engine process, its requests and what is known of its health.

submit() -> RequestStream      one a request (engine/stream.py), filled by the one task that reads the socket
_supervise()                   lives as long as the process; when that ends, for whatever reason, nobody waits in vain
_watch()                       notices a process that is there and does not answer, or a step without an end
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

from engine.config import EngineConfig
from engine.errors import ConfigurationError, EngineDeadError, EngineOverloadedError, InvalidRequestError
from engine.stream import Mailbox, RequestStream
from engine.types import EngineInfo, EngineStats, Request, TokenEvent
from engine.validate import check_request
from engine.wire import (
    PROTOCOL_VERSION,
    Abort,
    Add,
    Failed,
    FailureKind,
    FromEngine,
    Heartbeat,
    Hello,
    Ready,
    Shutdown,
    Start,
    StepOutput,
    ToEngine,
    WireError,
    check_hello,
    encode,
    receive_from_engine,
)

SILENCE_SECONDS = 2.0
"""Without a message for so long, the engine process counts as stopped: `healthy` is False until it speaks again."""

HANG_SECONDS = 10.0
"""Without a message for so long, it counts as hanging and is killed: whoever waits for it gets an error."""

TICK_SECONDS = 0.25
LEAVE_SECONDS = 5.0
"""How long an orderly shutdown may take before the process is killed."""

EXIT_SECONDS = 1.0
"""How long a process that has closed its socket may take to exit, and the other way round."""

SHUT_DOWN = "the engine was shut down"
_STDERR = 2
# OpenMP threads that wait by spinning hold up the very thread they wait for as soon as anything else, like
# this process, needs a core: a step then takes ten times as long. The operator's own setting goes before.
_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


class AsyncEngine:
    """One engine in a process of its own. Made by `start`; to be used from the event loop that started it alone."""

    info: EngineInfo
    stats: EngineStats
    """The latest snapshot; a step old at most."""
    error: str | None
    """Why the engine died, in one line; None while it lives and after an orderly shutdown."""

    def __init__(self, config: EngineConfig, info: EngineInfo, process: EngineProcess) -> None:
        self.info = info
        self.stats = EngineStats(num_blocks=info.num_blocks, num_free_blocks=info.num_blocks)
        self.error = None
        self._config = config
        self._process = process
        self._mailboxes: dict[str, Mailbox] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._ended: str | None = None
        self._cause: str | None = None
        self._silent_ticks = 0
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    @classmethod
    async def start(
        cls, config: EngineConfig, *, progress: bool = False, core: str = "engine.core:EngineCore.build"
    ) -> AsyncEngine:
        """Start the engine process and wait until the model is loaded; `progress` draws a bar on standard error.

        `core` is "module:factory" of what the process drives (engine.process.Core). Raises ConfigurationError with one
        line for what the operator can fix (options, checkpoint), EngineDeadError for anything else. When cancelled, it
        leaves no process behind.
        """
        process = await EngineProcess.spawn(core)
        try:
            info = await process.load(config, progress=progress)
        except BaseException:
            await process.kill()
            raise
        return cls(config, info, process)

    @property
    def healthy(self) -> bool:
        """Whether the process is there and was heard of in the last two seconds."""
        return self._ended is None and self._cause is None and self._silent_ticks * TICK_SECONDS < SILENCE_SECONDS

    @property
    def num_inflight(self) -> int:
        """Requests the engine may still hold something for, aborted ones until it has confirmed that it does not."""
        return len(self._mailboxes)

    def submit(self, request: Request) -> RequestStream:
        """Send a request to the engine; its events come from the returned stream.

        Raises at once: InvalidRequestError and ContextLengthError (engine/validate.py; also for an id in flight),
        EngineOverloadedError when the queue is full or the engine drains, EngineDeadError when it is gone.
        """
        if self._ended is not None:
            raise EngineDeadError(self._ended)
        if self._draining:
            raise EngineOverloadedError("the server is shutting down")
        if not self.healthy:
            raise EngineOverloadedError("the engine does not answer")
        check_request(request, self.info)
        if request.request_id in self._mailboxes:
            raise InvalidRequestError(f"request id {request.request_id!r} is in flight already", param="request_id")
        most = self.info.max_num_seqs + self._config.max_num_queued_requests
        if self.num_inflight >= most:
            raise EngineOverloadedError(f"{most} requests are in flight already, the most this server takes")
        self._process.send(Add(request))
        mailbox = Mailbox(request.request_id)
        self._mailboxes[request.request_id] = mailbox
        self._idle.clear()
        return RequestStream(mailbox, self._abandon)

    def abort(self, request_id: str) -> None:
        """Stop a request: its stream ends with a FinishReason.ABORT event. An id that is not in flight is ignored."""
        if (mailbox := self._mailboxes.get(request_id)) is not None:
            self._abandon(mailbox)

    async def drain(self) -> None:
        """Refuse new requests from now on, and wait until none is in flight. The caller bounds the time."""
        self._draining = True
        await self._idle.wait()

    async def wait_dead(self) -> str:
        """Wait until the engine has ended, and say why in one line. `error` is None if that was an orderly shutdown."""
        await asyncio.wait({self._supervisor})
        assert self._ended is not None
        return self._ended

    async def shutdown(self) -> None:
        """End the process, with whatever is in flight (its streams raise EngineDeadError). May be called again."""
        self._draining = True
        if self._ended is None and self._cause is None:
            self._cause = SHUT_DOWN
            self._process.send(Shutdown())
        try:
            await asyncio.wait({self._supervisor}, timeout=LEAVE_SECONDS)
        finally:
            self._process.signal_kill()
        await asyncio.wait({self._supervisor})

    def _abandon(self, mailbox: Mailbox) -> None:
        """Nobody wants more of this request. It stays in flight until the engine has confirmed, so that its id cannot
        come back meanwhile and be given the old request's tokens."""
        if mailbox.aborted or self._mailboxes.get(mailbox.request_id) is not mailbox:
            return
        mailbox.abort()
        self._process.send(Abort(mailbox.request_id))

    def _forget(self, request_id: str) -> None:
        self._mailboxes.pop(request_id, None)
        if not self._mailboxes:
            self._idle.set()

    async def _supervise(self) -> None:
        reading = asyncio.create_task(self._read(), name="engine reader")
        exiting = asyncio.create_task(self._process.wait(), name="engine exit")
        watching = asyncio.create_task(self._watch(), name="engine watchdog")
        await asyncio.wait({reading, exiting}, return_when=asyncio.FIRST_COMPLETED)
        # Its last words may still be in the socket, or it has closed that and is about to exit.
        await asyncio.wait({reading, exiting}, timeout=EXIT_SECONDS)
        watching.cancel()
        reading.cancel()
        await self._process.kill()
        await asyncio.wait({reading, exiting, watching})
        self._ended = self._cause or self._process.describe_exit()
        self.error = None if self._ended == SHUT_DOWN else self._ended
        for mailbox in self._mailboxes.values():
            mailbox.fail(self._ended)
        self._mailboxes.clear()
        self._idle.set()

    async def _read(self) -> None:
        """Until the engine has no more to say."""
        try:
            while (message := await self._process.receive()) is not None:
                self._silent_ticks = 0
                self._handle(message)
        except WireError as error:
            self._cause = self._cause or str(error)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case StepOutput(events, aborted, stats):
                self.stats = stats
                for event in events:
                    self._deliver(event)
                for request_id in aborted:
                    self._forget(request_id)
            case Heartbeat(busy_seconds):
                if busy_seconds > self._config.step_timeout:
                    self._give_up(f"the engine hangs: a step ran longer than {self._config.step_timeout:g} seconds")
            case Failed(_, text):
                self._cause = self._cause or f"the engine failed: {text}"
                self._process.close()
            case _:
                raise WireError(f"unexpected {type(message).__name__} from the engine")

    def _deliver(self, event: TokenEvent) -> None:
        mailbox = self._mailboxes.get(event.request_id)
        # An aborted request is gone only when the engine says so: the confirmation is still to come.
        if mailbox is not None and not mailbox.aborted:
            mailbox.put(event)
            if event.finish_reason is not None:
                self._forget(event.request_id)

    async def _watch(self) -> None:
        """Count the silence in ticks of this loop: when the server stalls, the engine is not to blame."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._silent_ticks += 1
            if self._silent_ticks * TICK_SECONDS > HANG_SECONDS:
                self._give_up(f"the engine hangs: nothing heard of it for {HANG_SECONDS:g} seconds")

    def _give_up(self, cause: str) -> None:
        self._cause = self._cause or cause
        self._process.signal_kill()


class EngineProcess:
    """The child process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, core: str) -> EngineProcess:
        """A fresh interpreter: nothing of this process but one end of a socket goes into it."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    # -P: an `engine` folder where the operator happens to stand is not our package.
                    *(sys.executable, "-P", "-m", "engine.process", "--fd", str(theirs.fileno()), "--core", core),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=_STDERR,
                    env={**_THREADS, **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            except BaseException:
                writer.transport.abort()
                raise
        return cls(process, reader, writer)

    async def load(self, config: EngineConfig, *, progress: bool) -> EngineInfo:
        """Greet and wait until the model is loaded. Raises ConfigurationError and EngineDeadError."""
        self.send(Hello(PROTOCOL_VERSION))
        self.send(Start(config, progress))
        try:
            if (message := await self.receive()) is not None:
                check_hello(message)
            while message is not None:
                message = await self.receive()
                match message:
                    case Ready(info):
                        return info
                    case Failed(FailureKind.CONFIGURATION, text):
                        raise ConfigurationError(text)
                    case Failed(_, text):
                        raise EngineDeadError(f"the engine failed while starting: {text}")
        except WireError as error:
            raise EngineDeadError(str(error)) from None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        await self.kill()
        raise EngineDeadError(f"{self.describe_exit()} while starting")

    def send(self, message: ToEngine) -> None:
        """Without waiting: what the engine has not read yet is bounded by the number of requests in flight."""
        frame = encode(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> FromEngine | None:
        return await receive_from_engine(self._reader)

    async def wait(self) -> int:
        return await self._process.wait()

    def signal_kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Close the socket, which makes the process leave."""
        self._writer.close()

    async def kill(self) -> None:
        """Make sure that the process is gone and reaped, and the socket closed."""
        self.signal_kill()
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await self._process.wait()

    def describe_exit(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process ended with exit code {code}"
