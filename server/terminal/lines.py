"""Input: lines typed at a terminal, edited and remembered, or read from anything else; messages of such lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TextIO

MAX_HISTORY = 1000

Lines = Callable[[str], str]
"""The next line, without its end, asked for with a prompt. Raises EOFError when there is none."""


def read_message(lines: Lines) -> str:
    """A line, and the next for as long as there is a backslash at the end. Raises EOFError."""
    message = lines("> ")
    while message.endswith("\\"):
        try:
            message = f"{message[:-1]}\n{lines('. ')}"
        except EOFError:
            return message[:-1]
    return message


def plain_lines(stream: TextIO) -> Lines:
    """The lines of `stream`; nothing is prompted for."""

    def line(_: str) -> str:
        text = stream.readline()
        if not text:
            raise EOFError
        return text.removesuffix("\n")

    return line


@contextmanager
def typed_lines(history: Path) -> Iterator[Lines]:
    """Lines typed at the terminal, with editing and a history in the file `history` where Python has readline."""
    readline = _readline()
    if readline is None:
        yield input
        return
    readline.parse_and_bind("tab: self-insert")
    # Python turns it off. With it, text of several lines that is pasted is one message.
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(MAX_HISTORY)
    with suppress(OSError):  # there is none yet
        readline.read_history_file(history)
    try:
        yield input
    finally:
        with suppress(OSError):  # a chat does not fail for its history
            _save(readline, history)


def _save(readline: ModuleType, history: Path) -> None:
    history.parent.mkdir(parents=True, exist_ok=True)
    history.touch(mode=0o600)
    history.chmod(0o600)  # before anything is in it; and after, for it may be another file now
    readline.write_history_file(history)
    history.chmod(0o600)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
