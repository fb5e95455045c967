"""The engine process: inbox -> core.step() -> outbox.

Started by engine/client.py as `python -m engine.process --fd N --core module:factory`, where N is an inherited socket
(engine/wire.py says what is spoken on it). Three threads: the main one alone touches the core; a reader fills the
inbox; a pulse tells the server every half second for how long the current step has been running.

The process leaves when told to, when the core breaks, and at once when the server's end of the socket closes. It
ignores SIGINT and SIGTERM: terminals and supervisors send them to all processes of a service, and when to leave is the
server's decision: at its word, or when its end of the socket closes.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from functools import reduce
from typing import Protocol

from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.grammar.vocabulary import GrammarVocabulary
from engine.types import CapacityWhatIf, EngineInfo, EngineStats, ExpertReport, Request, TokenEvent
from engine.wire import (
    HEARTBEAT_SECONDS,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Answer,
    AskExperts,
    AskWhatIf,
    Failed,
    FailureKind,
    FromEngine,
    Heartbeat,
    Hello,
    Ready,
    ResetExperts,
    Shutdown,
    Start,
    StepOutput,
    ToEngine,
    UseVocabulary,
    WireError,
    check_hello,
    encode,
    receive_to_engine,
)
from weights.errors import WeightsError

LINGER_SECONDS = 1.0
"""How long a failed process waits for the server to have read why, before it exits."""

MAX_MESSAGE_CHARS = 500


class Core(Protocol):
    """What this process drives; `engine.core.EngineCore` is one. Used from one thread."""

    info: EngineInfo

    @property
    def has_work(self) -> bool:
        """Whether a step would advance any request."""

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """Learn what the tokens stand for; called before the first request with a grammar."""

    def add(self, request: Request) -> None:
        """Take a request that has been checked and whose id is not in use."""

    def abort(self, request_id: str) -> None:
        """Drop a request, without an event. An id that is not live is ignored."""

    def step(self) -> list[TokenEvent]:
        """Advance every scheduled request once. Raises when the engine is broken for good."""

    def stats(self) -> EngineStats:
        """A snapshot after the last step."""

    def expert_report(self) -> ExpertReport:
        """Routing statistics. Called only when `info.record_routing`, like the next two."""

    def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf:
        """What a capacity factor would have dropped of the traffic seen."""

    def reset_experts(self) -> ExpertReport:
        """Start the routing statistics anew, and return what they said until now."""


class CoreFactory(Protocol):
    def __call__(self, config: EngineConfig, *, progress: bool) -> Core:
        """Load and return a core. Raises ConfigurationError or WeightsError for what the operator can fix."""


class Outbox:
    """Whole frames to the server, from any thread. While the server does not read, the sender waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        frame = encode(message)
        with self._lock:
            try:
                self._socket.sendall(frame)
            except OSError:
                os._exit(1)  # the server is gone, and with it whoever could be told


class Inbox:
    """Messages from the server, in order. Reading starts at once, so that its end is noticed while a model loads."""

    def __init__(self, sock: socket.socket, outbox: Outbox) -> None:
        self._socket = sock
        self._outbox = outbox
        self._queue: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)
        self._thread.start()

    def get(self) -> ToEngine:
        """The next message; waits for it."""
        return self._queue.get()

    def get_all(self, *, wait: bool) -> list[ToEngine]:
        """All messages that are there; with `wait`, at least one."""
        messages = [self._queue.get()] if wait else []
        while not self._queue.empty():
            messages.append(self._queue.get())
        return messages

    def linger(self) -> None:
        """Give the server a moment to read what was sent. Its reply is to close the socket, which ends the process."""
        self._thread.join(LINGER_SECONDS)

    def close(self) -> None:
        """End the reading, and not the process with it."""
        self._closing = True
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join()

    def _read(self) -> None:
        try:
            while (message := receive_to_engine(self._socket)) is not None:
                self._queue.put(message)
        except WireError as error:
            self._outbox.send(Failed(FailureKind.CRASH, str(error)))
        if not self._closing:
            # The main thread may be deep inside a step, and there is nobody left to compute for.
            os._exit(1)


class Pulse:
    """Tells the server, from a thread of its own, for how long the main thread has been inside `with pulse`."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            since = self._since
            self._outbox.send(Heartbeat(0.0 if since is None else time.monotonic() - since))


def run(sock: socket.socket, core_path: str) -> int:
    """Serve one client on `sock` with the core that `core_path` ("module:factory") builds; the exit code."""
    outbox = Outbox(sock)
    outbox.send(Hello(PROTOCOL_VERSION))
    inbox = Inbox(sock, outbox)
    pulse = Pulse(outbox)
    try:
        core = _start(inbox, core_path)
        outbox.send(Ready(core.info))
        _loop(core, inbox, outbox, pulse)
    except _StartupError as error:
        outbox.send(Failed(FailureKind.CONFIGURATION, _one_line(error)))
    except Exception as error:
        traceback.print_exc()
        outbox.send(Failed(FailureKind.CRASH, f"{type(error).__name__}: {_one_line(error)}"))
    else:
        pulse.stop()
        inbox.close()
        return 0
    inbox.linger()
    return 1


class _StartupError(Exception):
    """What the operator can fix; told in one line, without a traceback."""


def _start(inbox: Inbox, core_path: str) -> Core:
    """Greet, learn the configuration and build the core."""
    try:
        check_hello(inbox.get())
        message = inbox.get()
        if not isinstance(message, Start):
            raise WireError(f"expected Start, got {type(message).__name__}")
        return _find_factory(core_path)(message.config, progress=message.progress)
    except (ConfigurationError, WeightsError, WireError) as error:
        raise _StartupError(str(error)) from None


def _loop(core: Core, inbox: Inbox, outbox: Outbox, pulse: Pulse) -> None:
    """Until told to leave: take what arrived, advance everybody once, tell what happened; sleep without work."""
    while True:
        messages = inbox.get_all(wait=not core.has_work)
        with pulse:
            aborted = []
            for message in messages:
                match message:
                    case UseVocabulary(vocabulary):
                        core.use_vocabulary(vocabulary)
                    case Add(request):
                        core.add(request)
                    case Abort(request_id):
                        core.abort(request_id)
                        aborted.append(request_id)
                    case AskExperts(ask_id):
                        outbox.send(Answer(ask_id, report=core.expert_report()))
                    case AskWhatIf(ask_id, capacity_factor):
                        outbox.send(Answer(ask_id, what_if=core.capacity_what_if(capacity_factor)))
                    case ResetExperts(ask_id):
                        outbox.send(Answer(ask_id, report=core.reset_experts()))
                    case Shutdown():
                        return
                    case _:
                        raise WireError(f"unexpected {type(message).__name__}")
            events = core.step() if core.has_work else []
            output = StepOutput(events, aborted, core.stats())
        outbox.send(output)


def _find_factory(core_path: str) -> CoreFactory:
    """ "engine.core:EngineCore.build" -> that attribute of that module."""
    module_name, _, attributes = core_path.partition(":")
    factory: CoreFactory = reduce(getattr, attributes.split("."), importlib.import_module(module_name))
    return factory


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 3]}..."


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m engine.process", description="One engine, for one server.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the server")
    parser.add_argument("--core", required=True, help="module:factory that builds the core")
    arguments = parser.parse_args(argv)
    # Whatever this process starts must not hold the socket open after it.
    os.set_inheritable(arguments.fd, False)
    with socket.socket(fileno=arguments.fd) as sock:
        return run(sock, arguments.core)


if __name__ == "__main__":
    sys.exit(main())
