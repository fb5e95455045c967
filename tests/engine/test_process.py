"""engine/process.py, spoken to over its socket by a client that can also misbehave."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from engine import wire
from engine.process import Outbox
from tests.engine.fake_core import CORE, Script, config_for, make_report, make_request

ROOT = Path(__file__).parents[2]
DECODER: msgspec.msgpack.Decoder[wire.FromEngine] = msgspec.msgpack.Decoder(wire.FromEngine)


def receive(sock: socket.socket) -> wire.FromEngine | None:
    if not (header := sock.recv(4, socket.MSG_WAITALL)):
        return None
    return DECODER.decode(sock.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL))


class RawClient:
    """A process and its socket. `receive` skips heartbeats unless told otherwise; None is the end of the stream."""

    def __init__(self, core: str = CORE) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine.process", "--fd", str(theirs.fileno()), "--core", core],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )

    def send(self, *messages: wire.ToEngine) -> None:
        self.socket.sendall(b"".join(map(wire.encode, messages)))

    def receive(self, *, heartbeats: bool = False) -> wire.FromEngine | None:
        while True:
            message = receive(self.socket)
            if heartbeats or not isinstance(message, wire.Heartbeat):
                return message

    def load(self, script: Script) -> None:
        self.send(wire.Hello(wire.PROTOCOL_VERSION), wire.Start(config_for(script), False))
        assert self.receive() == wire.Hello(wire.PROTOCOL_VERSION)
        assert isinstance(self.receive(), wire.Ready)

    def output(self) -> wire.StepOutput:
        message = self.receive()
        assert isinstance(message, wire.StepOutput)
        return message

    def tokens_of(self, request_id: str, count: int) -> list[int]:
        """The next `count` tokens of a request."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += [token for e in self.output().events if e.request_id == request_id for token in e.token_ids]
        return tokens

    def end(self) -> tuple[int, str]:
        """Exit code and what went to standard error, of a process that leaves by itself; the socket is closed."""
        self.socket.close()
        _, errors = self.process.communicate(timeout=5)
        return self.process.returncode, errors


@pytest.fixture
def start() -> Iterator[Callable[..., RawClient]]:
    with contextlib.ExitStack() as stack:

        def start_one(core: str = CORE) -> RawClient:
            client = RawClient(core)
            stack.callback(client.process.communicate)
            stack.callback(client.process.kill)
            stack.callback(client.socket.close)
            return client

        yield start_one


def test_a_request_and_an_orderly_end(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script())
    client.send(wire.Add(make_request("a", first=7, max_tokens=3)))
    events = [event for _ in range(3) for event in client.output().events]
    assert [event.token_ids for event in events] == [(7,), (8,), (9,)]
    assert [event.finish_reason for event in events] == [None, None, "length"]
    client.send(wire.Shutdown())
    assert client.receive() is None
    assert client.end() == (0, "")


def test_one_message_a_step(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script())
    client.send(*(wire.Add(make_request(f"r{i}", max_tokens=100)) for i in range(5)))
    outputs = [client.output()]
    while outputs[-1].stats.num_running:
        outputs.append(client.output())
    assert [output.stats.num_steps for output in outputs] == list(range(1, len(outputs) + 1))
    assert sum(len(output.events) for output in outputs) == 500
    assert all(len({event.request_id for event in output.events}) == len(output.events) for output in outputs)


def test_aborts_are_confirmed_also_of_unknown_ids_and_without_work(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script(step_seconds=0.01))
    client.send(wire.Add(make_request("a", max_tokens=None)))
    client.tokens_of("a", 2)
    client.send(wire.Abort("a"), wire.Abort("b"))
    outputs = [client.output()]
    while sum(len(output.aborted) for output in outputs) < 2:
        outputs.append(client.output())
    assert [request_id for output in outputs for request_id in output.aborted] == ["a", "b"]
    assert outputs[-1].stats.num_running == 0


def test_questions_are_answered_between_steps_and_without_work(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script(step_seconds=0.05))
    client.send(wire.AskExperts(1))
    assert client.receive() == wire.Answer(1, report=make_report(0))
    assert client.output().events == []
    client.send(wire.Add(make_request("a", max_tokens=None)))
    assert client.tokens_of("a", 3) == [1, 2, 3]
    client.send(wire.AskWhatIf(2, 1.25), wire.ResetExperts(3), wire.AskExperts(4))
    answers: list[wire.Answer] = []
    while len(answers) < 3:
        message = client.receive()
        if isinstance(message, wire.Answer):
            answers.append(message)
    what_if, reset, report = answers
    assert what_if.what_if is not None
    assert (what_if.ask_id, what_if.what_if.capacity_factor, what_if.report) == (2, 1.25, None)
    assert what_if.what_if.window_steps >= 3
    assert reset == wire.Answer(3, report=make_report(what_if.what_if.window_steps)), "what it was until then"
    assert report == wire.Answer(4, report=make_report(0))
    assert len(client.tokens_of("a", 2)) == 2, "the request goes on"


def test_idle_costs_no_processor_time(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script())
    process = psutil.Process(client.process.pid)
    before = process.cpu_times()
    time.sleep(1)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1


def test_heartbeats_tell_how_long_a_step_runs(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script(sleep_at=2, sleep_seconds=1.4))
    client.send(wire.Add(make_request("a", max_tokens=2)))
    busy = []
    while not isinstance(message := client.receive(heartbeats=True), wire.StepOutput) or message.stats.num_steps < 2:
        busy += [message.busy_seconds] if isinstance(message, wire.Heartbeat) else []
    assert busy[-1] > 0.7
    assert busy[-2] < busy[-1] < 1.5
    while not isinstance(message := client.receive(heartbeats=True), wire.Heartbeat):
        pass
    assert message.busy_seconds == 0.0


def test_a_client_that_does_not_read_loses_nothing(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script())
    client.send(wire.Add(make_request("a", first=0, max_tokens=5_000)))
    time.sleep(0.6)
    assert psutil.Process(client.process.pid).memory_info().rss < 150 * 2**20
    assert client.tokens_of("a", 5_000) == [i % 1000 for i in range(5_000)]


def test_frames_of_two_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    messages = [wire.Failed(wire.FailureKind.CRASH, letter * 300_000) for letter in "ab"]
    with ours, theirs:
        outbox = Outbox(theirs)

        def send_often(message: wire.Failed) -> None:
            for _ in range(20):
                outbox.send(message)

        threads = [threading.Thread(target=send_often, args=(message,)) for message in messages]
        for thread in threads:
            thread.start()
        received = [receive(ours) for _ in range(40)]
        for thread in threads:
            thread.join()
    assert all(received.count(message) == 20 for message in messages)


@pytest.mark.parametrize("load", ["configuration", "weights"])
def test_what_the_operator_can_fix_is_one_line(start: Callable[..., RawClient], load: str) -> None:
    client = start()
    client.send(wire.Hello(wire.PROTOCOL_VERSION), wire.Start(config_for(Script(load=load)), False))
    assert isinstance(client.receive(), wire.Hello)
    failed = client.receive()
    assert isinstance(failed, wire.Failed)
    assert failed.kind is wire.FailureKind.CONFIGURATION
    assert "too small" in failed.message or "3 bytes long" in failed.message
    assert "\n" not in failed.message
    assert client.end() == (1, "")


def test_a_crash_while_loading_has_a_traceback(start: Callable[..., RawClient]) -> None:
    client = start()
    client.send(wire.Hello(wire.PROTOCOL_VERSION), wire.Start(config_for(Script(load="crash")), False))
    assert isinstance(client.receive(), wire.Hello)
    assert client.receive() == wire.Failed(wire.FailureKind.CRASH, "RuntimeError: device on fire")
    code, errors = client.end()
    assert code == 1
    assert "Traceback" in errors


def test_a_crash_in_a_step_is_told_and_exits_with_1(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script(raise_at=3))
    client.send(wire.Add(make_request("a", max_tokens=None)))
    client.tokens_of("a", 2)
    assert client.receive() == wire.Failed(wire.FailureKind.CRASH, "RuntimeError: step on fire")
    # Nobody closes the socket: the process leaves all the same.
    assert client.process.wait(timeout=3) == 1


def test_another_protocol_version_is_refused(start: Callable[..., RawClient]) -> None:
    client = start()
    client.send(wire.Hello(wire.PROTOCOL_VERSION + 1))
    assert client.receive() == wire.Hello(wire.PROTOCOL_VERSION)
    failed = client.receive()
    assert isinstance(failed, wire.Failed)
    assert "protocol version" in failed.message
    assert client.end() == (1, "")


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"], ids=["size", "payload"])
def test_garbage_ends_the_process(start: Callable[..., RawClient], garbage: bytes) -> None:
    client = start()
    client.load(Script())
    client.socket.sendall(garbage)
    assert isinstance(client.receive(), wire.Failed)
    assert client.end()[0] == 1


@pytest.mark.parametrize(
    "script", [Script(load_seconds=60), Script(sleep_at=1), Script()], ids=["load", "step", "idle"]
)
def test_it_leaves_at_once_when_the_server_is_gone(start: Callable[..., RawClient], script: Script) -> None:
    client = start()
    client.send(wire.Hello(wire.PROTOCOL_VERSION), wire.Start(config_for(script), False))
    client.send(wire.Add(make_request("a", max_tokens=2)))
    assert isinstance(client.receive(), wire.Hello)
    time.sleep(0.1)
    began = time.monotonic()
    client.end()
    # The next heartbeat, 0.4 seconds from now, would fail too and end the process: that is too late.
    assert time.monotonic() - began < 0.35


def test_interrupt_and_terminate_are_ignored(start: Callable[..., RawClient]) -> None:
    client = start()
    client.load(Script(step_seconds=0.01))
    client.send(wire.Add(make_request("a", max_tokens=None)))
    client.tokens_of("a", 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(client.process.pid, number)
        client.tokens_of("a", 20)
