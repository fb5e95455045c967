"""AsyncEngine: the engine as the server sees it. Owns the engine process, its requests and what is known of its health.

submit() -> RequestStream      one a request (engine/stream.py), filled by the one task that reads the socket
_supervise()                   lives as long as the process; when that ends, for whatever reason, nobody waits in vain
_watch()                       notices a process that is there and does not answer, or a step without an end
"""

from __future__ import annotations

import asyncio

from engine.child import EXIT_SECONDS, EngineProcess
from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineOverloadedError, InvalidRequestError
from engine.grammar.vocabulary import GrammarVocabulary
from engine.stream import Mailbox, RequestStream
from engine.types import CapacityWhatIf, EngineInfo, EngineStats, ExpertReport, Request, TokenEvent
from engine.validate import check_request
from engine.wire import (
    Abort,
    Add,
    Answer,
    AskExperts,
    AskWhatIf,
    Failed,
    FromEngine,
    Heartbeat,
    ResetExperts,
    Shutdown,
    StepOutput,
    UseVocabulary,
    WireError,
)

SILENCE_SECONDS = 2.0
"""Without a message for so long, the engine process counts as stopped: `healthy` is False until it speaks again."""

HANG_SECONDS = 10.0
"""Without a message for so long, it counts as hanging and is killed: whoever waits for it gets an error."""

TICK_SECONDS = 0.25
LEAVE_SECONDS = 5.0
"""How long an orderly shutdown may take before the process is killed."""

SHUT_DOWN = "the engine was shut down"


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
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._num_asked = 0
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

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """Tell the engine what the tokens stand for, before the first request with a grammar."""
        self._process.send(UseVocabulary(vocabulary))

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

    async def expert_report(self) -> ExpertReport:
        """Routing statistics, between two steps. Raises InvalidRequestError when routing is not recorded, and
        EngineDeadError."""
        report = (await self._ask(AskExperts(self._next_ask()))).report
        assert report is not None
        return report

    async def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf:
        """What a capacity factor (> 0) would have dropped of the traffic seen. Raises as `expert_report`."""
        what_if = (await self._ask(AskWhatIf(self._next_ask(), capacity_factor))).what_if
        assert what_if is not None
        return what_if

    async def reset_experts(self) -> ExpertReport:
        """Start the routing statistics anew, and return what they said until now. Raises as `expert_report`."""
        report = (await self._ask(ResetExperts(self._next_ask()))).report
        assert report is not None
        return report

    def _next_ask(self) -> int:
        self._num_asked += 1
        return self._num_asked

    async def _ask(self, question: AskExperts | AskWhatIf | ResetExperts) -> Answer:
        if self._ended is not None:
            raise EngineDeadError(self._ended)
        if not self.info.record_routing:
            raise InvalidRequestError("this server does not record routing (--no-record-routing)")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[question.ask_id] = future
        self._process.send(question)
        try:
            return await future
        finally:
            self._asked.pop(question.ask_id, None)

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
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EngineDeadError(self._ended))
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
            case Answer(ask_id):
                if (future := self._asked.get(ask_id)) is not None and not future.done():
                    future.set_result(message)
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
