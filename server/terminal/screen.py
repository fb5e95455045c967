"""Output: answers as they come, notes and errors; nothing in a text can command the terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO

# C0 and DEL have pictures in Unicode, C1 has none. A carriage return could only hide what stands before it: it goes.
_SHOWN: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20)}
_SHOWN |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SHOWN |= {ord("\t"): ord("\t"), ord("\n"): ord("\n"), ord("\r"): None}

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


def printable(text: str) -> str:
    """`text` with every control character but tab and line feed made visible, and without carriage returns."""
    return text.translate(_SHOWN)


def discard_output() -> None:
    """Whoever read standard output has left, and Python will still flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen:
    """Writes to `out`, and errors to `err`. `colour`: notes are dim if `out` is a terminal."""

    def __init__(self, out: TextIO, err: TextIO, *, colour: bool) -> None:
        self.terminal = out.isatty()
        self._out = out
        self._err = err
        self._colour = colour and self.terminal
        self._inside_line = False

    def text(self, text: str) -> None:
        """A piece of an answer, at once."""
        if text := printable(text):
            self._out.write(text)
            self._out.flush()
            self._inside_line = not text.endswith("\n")

    def line(self, text: str) -> None:
        self.end_line()
        self._out.write(f"{printable(text)}\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        self.end_line()
        shown = printable(text)
        self._out.write(f"{_DIM}{shown}{_NORMAL}\n" if self._colour else f"{shown}\n")
        self._out.flush()

    def error(self, text: str) -> None:
        self.end_line()
        self._err.write(f"error: {printable(text)}\n")
        self._err.flush()

    def end_line(self) -> None:
        """Whatever comes next starts a line."""
        if self._inside_line:
            self._inside_line = False
            self._out.write("\n")
            self._out.flush()
