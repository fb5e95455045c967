"""The process that tries grammars, without the server that started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from engine.grammar import GrammarSpec
from engine.grammar.check_process import ALONE_SECONDS, HEADER_BYTES, Setup, Verdict, encode
from tests.engine.grammar.hopeless import SLOW
from tests.engine.grammar.texts import byte_vocabulary


class Process:
    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen

    def send(self, message: Setup | GrammarSpec) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(encode(message))
        self.popen.stdin.flush()

    def receive(self) -> Verdict:
        assert self.popen.stdout is not None
        header = self.popen.stdout.read(HEADER_BYTES)
        payload = self.popen.stdout.read(int.from_bytes(header, "little"))
        return msgspec.msgpack.decode(payload, type=Verdict)

    def leave(self) -> None:
        """Let go of it, as a server that was killed does."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        self.popen.stdout.close()


@contextmanager
def running() -> Iterator[Process]:
    """One that is ready. It says nothing but its answers."""
    command = [sys.executable, "-m", "engine.grammar.check_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as popen:
        try:
            process = Process(popen)
            process.send(Setup(byte_vocabulary(), max_chars=1000))
            assert process.receive() == Verdict()
            yield process
            assert popen.stderr is not None
            assert popen.stderr.read() == b""
        finally:
            popen.kill()


def test_verdicts_come_in_order() -> None:
    with running() as process:
        good = GrammarSpec.choice(["a"])
        for spec in (good, GrammarSpec.regex("("), good, GrammarSpec("json_schema", "[" * 60_000)):
            process.send(spec)
        assert process.receive() == Verdict(source=good.source())
        assert process.receive() == Verdict(error="invalid regex: unclosed group")
        assert process.receive() == Verdict(source=good.source())
        assert process.receive() == Verdict(error="nested too deeply")
        process.leave()
        assert process.popen.wait(5) == 0


def test_it_leaves_with_its_server() -> None:
    with running() as process:
        process.leave()
        assert process.popen.wait(5) == 0


def test_it_leaves_in_the_middle_of_a_grammar_too() -> None:
    """Nobody is left to kill it."""
    with running() as process:
        process.send(SLOW)
        begin = time.monotonic()
        time.sleep(0.2)
        process.leave()
        assert process.popen.wait(ALONE_SECONDS + 5) == -signal.SIGALRM
        assert time.monotonic() - begin > ALONE_SECONDS - 0.5


def test_the_time_is_that_of_a_grammar() -> None:
    """Between two of them the process may wait as long as it likes."""
    with running() as process:
        process.send(GrammarSpec.choice(["a"]))
        assert process.receive().error is None
        time.sleep(ALONE_SECONDS + 0.5)
        process.send(GrammarSpec.choice(["a"]))
        assert process.receive().error is None
        process.leave()
        assert process.popen.wait(5) == 0


def test_ctrl_c_is_the_servers_matter() -> None:
    """A terminal sends it to all processes of its group."""
    with running() as process:
        process.popen.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send(GrammarSpec.choice(["a"]))
        assert process.receive().error is None
        process.leave()
        assert process.popen.wait(5) == 0
