"""`python -m server chat`, or another command, at a terminal of its own, typed at and read by a test."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
UP = "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"

# A session leader that opens a terminal gets it as its controlling one: Ctrl-C there is a signal for it. The signal has
# its meaning, though the tests may run in the background of a shell, which takes it away.
_START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.isatty(0):
    os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.executable, [sys.executable, "-m", "server", *sys.argv[1:]])
"""
CHAT = [sys.executable, "-c", _START, "chat"]
EXPERTS = [sys.executable, "-c", _START, "experts"]


def chat_environment(cache: Path, **more: str) -> dict[str, str]:
    """That of the tests, without what would change a chat."""
    unwanted = {"MIXSERVE_API_KEY", "OPENAI_API_KEY", "NO_COLOR"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"MIXSERVE_CACHE": str(cache), "TERM": "xterm", "INPUTRC": "/dev/null"} | more


class PtyChat:
    """`shown` is all that has reached the terminal; `expect` looks behind what it found last."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.shown = ""
        self._master = master
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str) -> None:
        assert self._find(text, 20.0), f"no {text!r} in {self.shown[self._seen :]!r}"

    def say(self, text: str) -> None:
        """Type a message at the next prompt."""
        self.expect("> ")
        self.type(f"{text}\r")

    def ctrl_c(self, expected: str | None) -> None:
        """Press Ctrl-C, and wait for `expected`; None: for the end.

        CPython may miss a signal between two of readline's waits until there is another: so press again if need be.
        """
        for _ in range(5):
            self.type("\x03")
            if self._find(expected, 4.0):
                return
        raise AssertionError(f"no {expected!r} in {self.shown[self._seen :]!r}")

    def exit_code(self) -> int:
        assert self._find(None, 20.0), f"it goes on: {self.shown[self._seen :]!r}"
        return self.process.wait(10)

    def _find(self, text: str | None, seconds: float) -> bool:
        """Whether `text`, or for None the end, comes in time."""
        deadline = time.monotonic() + seconds
        while text is None or (at := self.shown.find(text, self._seen)) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not select.select([self._master], [], [], left)[0]:
                continue
            try:
                part = os.read(self._master, 65536)
            except OSError:  # how Linux tells that nobody has the other side any more
                part = b""
            if not part:
                assert text is None, f"it ended without {text!r}: {self.shown[self._seen :]!r}"
                return True
            self.shown += self._decoder.decode(part)
        self._seen = at + len(text)
        return True


@contextlib.contextmanager
def pty_chat(
    *args: str, environment: dict[str, str], command: Sequence[str] = CHAT, size: tuple[int, int] = (50, 500)
) -> Iterator[PtyChat]:
    """`size`: lines and columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with contextlib.closing(os.fdopen(master, "r+b", buffering=0)):
        with os.fdopen(slave, "r+b", buffering=0) as terminal:
            process = subprocess.Popen(
                [*command, *args],
                cwd=ROOT,
                env=environment,
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                start_new_session=True,
            )
        try:
            yield PtyChat(process, master)
        finally:
            process.kill()
            process.wait()
