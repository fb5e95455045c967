"""CallParser: an answer's text -> its content and its calls, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass

from server.tools.formats import CallFormat
from server.tools.readers import NotACallError
from server.tools.scanner import NotJsonError


@dataclass(frozen=True, slots=True)
class Said:
    """The next text of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next text of a call's arguments: JSON, as the model wrote it."""

    index: int
    text: str


Piece = Said | CallBegun | CallArguments


class CallParser:
    """Takes the text of one answer in pieces of any size; the same text makes the same content and calls.

    - Text is content, but for what could become the marker of a call: that is held back until it is decided. White
      space alone, before a call or after one, is no content.
    - A call begins once its name and the first character of its arguments were read; the text of the arguments follows
      as it comes.
    - What turns out to be no call before that is content, the marker too. What comes after it, and can be no JSON,
      is content from there: the call stays begun, and is not counted. So nothing is ever taken back.
    - Control tokens have no text in the content, unless `shows_special`.
    """

    def __init__(self, form: CallFormat, *, shows_special: bool) -> None:
        self.num_whole = 0
        """Calls whose arguments were whole."""
        self._form = form
        self._marker = re.compile("|".join(map(re.escape, form.opening)))
        self._hidden = str.maketrans({sign: text if shows_special else "" for sign, text in form.signs.items()})
        self._num_begun = 0
        self._pieces: list[Piece] = []
        self._arguments: list[str] = []  # of the last call, not yet a piece
        self._content: list[str] = []  # not yet a piece
        self._blank = True  # nothing but white space since the beginning, or since the last call
        self._space = ""  # that white space
        self._tail = ""  # what could become a marker
        self._reader: Generator[None, str, None] | None = None
        self._marked = ""  # white space and marker in front of what the reader reads, while it may be text
        self._unread: list[str] = []  # what it has read of which nothing was told
        self._closing = False

    def push(self, text: str) -> list[Piece]:
        """What `text` brings."""
        while text:
            text = self._read_text(text) if self._reader is None else self._read_call(self._reader, text)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        while self._reader is not None:
            if self._closing:
                self.close()
            rest, self._reader = self._give_back(), None
            while rest:
                rest = self._read_text(rest) if self._reader is None else self._read_call(self._reader, rest)
        self._say(self._tail)
        self._tail = ""
        if self._blank and not self._num_begun:
            self._content.append(self._space)
        return self._take()

    def begin(self, name: str) -> None:
        self._flush()
        self.close()
        self._pieces.append(CallBegun(self._num_begun, self._form.new_id(), name))
        self._num_begun += 1

    def arguments(self, text: str) -> None:
        self._unread.clear()
        self._arguments.append(text)

    def end(self) -> None:
        self.num_whole += 1

    def close(self) -> None:
        self._unread.clear()
        self._marked = ""
        self._blank = True

    def closing(self) -> None:
        self._closing = True

    def _read_text(self, text: str) -> str:
        """Read up to and with the next marker; what follows it."""
        text = self._tail + text
        self._tail = ""
        if match := self._marker.search(text):
            self._say(text[: match.start()])
            self._marked = self._space + match[0]
            self._space = ""
            self._closing = False
            self._reader = self._form.read(self)
            next(self._reader)
            return text[match.end() :]
        kept = self._length_of_beginning(text)
        self._say(text[: len(text) - kept])
        self._tail = text[len(text) - kept :]
        return ""

    def _read_call(self, reader: Generator[None, str, None], text: str) -> str:
        """Read as far as it is a call; what follows, or is none."""
        for position, char in enumerate(text, start=1):
            self._unread.append(char)
            try:
                reader.send(char)
            except StopIteration:
                self._reader = None
                return text[position:]
            except (NotACallError, NotJsonError):
                self._reader = None
                return self._give_back() + text[position:]
        return ""

    def _give_back(self) -> str:
        """Let the marker be content, if nothing has come of it; what was read after it, to be read again as text."""
        text = "".join(self._unread)
        self._unread.clear()
        marked, self._marked = self._marked, ""
        self._say(marked)
        return text

    def _say(self, text: str) -> None:
        if self._blank:
            if not text or text.isspace():
                self._space += text
                return
            self._blank = False
            text = self._space + text
            self._space = ""
        self._content.append(text.translate(self._hidden))

    def _length_of_beginning(self, text: str) -> int:
        """How many of the last characters could be the beginning of a marker."""
        longest = min(len(text), max(map(len, self._form.opening)) - 1)
        for length in range(longest, 0, -1):
            if any(sign.startswith(text[-length:]) for sign in self._form.opening):
                return length
        return 0

    def _take(self) -> list[Piece]:
        self._flush()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _flush(self) -> None:
        """Content never comes before arguments here: a call that begins flushes it."""
        if self._arguments:
            self._pieces.append(CallArguments(self._num_begun - 1, "".join(self._arguments)))
            self._arguments.clear()
        if text := "".join(self._content):
            self._pieces.append(Said(text))
        self._content.clear()
