"""Calls, character by character: a generator that is sent each character, and returns at the end of what is its own.

What is read is told to a `Calls`. A NotACallError ends a reader at a character that cannot come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from server.protocol.tools import FUNCTION_NAME
from server.tools.scanner import JsonScanner

T = TypeVar("T")
Chars = Generator[None, str, T]
"""Takes characters, then returns a T."""

_SPACE = " \t\n\r"
_NAME = re.compile(FUNCTION_NAME)
_NAME_CHAR = re.compile(r"[A-Za-z0-9_-]")


class NotACallError(ValueError):
    """The text is no call in this format, whatever follows."""


class Calls(Protocol):
    """Is told of calls as they are read. What was not told when a reader fails is text."""

    def begin(self, name: str) -> None:
        """A call of `name`, whose arguments follow."""

    def arguments(self, text: str) -> None:
        """The next text of its arguments."""

    def end(self) -> None:
        """The arguments were whole."""

    def close(self) -> None:
        """What was read since belongs to the calls."""

    def closing(self) -> None:
        """So does what comes now, should the text end in it."""


def read_hermes(calls: Calls, closing_signs: Sequence[str]) -> Chars[None]:
    """After <tool_call>: {"name": …, "arguments": {…}} and the closing tag."""
    yield from _call_object(calls)
    calls.closing()
    yield from _one_of(closing_signs, (yield from _solid()))
    calls.close()


def read_mistral(calls: Calls, id_signs: Sequence[str], argument_signs: Sequence[str]) -> Chars[None]:
    """After [TOOL_CALLS]: a list of such objects, or one call as name{…}, name[ARGS]{…}, name[CALL_ID]id[ARGS]{…}."""
    char = yield from _solid()
    if char == "[":
        while True:
            yield from _call_object(calls)
            char = yield from _solid()
            if char == "]":
                break
            _require(char == ",")
    else:
        name, char = yield from _word(char)
        if any(sign.startswith(char) for sign in (*id_signs, *argument_signs)):
            sign = yield from _one_of((*id_signs, *argument_signs), char)
            if sign in id_signs:
                _, char = yield from _word((yield))
                yield from _one_of(argument_signs, char)
            char = yield from _solid()
        elif char in _SPACE:
            char = yield from _solid()
        _require(char == "{")
        calls.begin(_checked(name))
        yield from _json(char, calls.arguments)
        calls.end()
    calls.close()


def _call_object(calls: Calls) -> Chars[None]:
    """{"name": …, "arguments": {…}}, in either order; other strings beside them (an id) are read over."""
    _require((yield from _solid()) == "{")
    name: str | None = None
    held: list[str] | None = None  # arguments that came before the name
    begun = False
    while True:
        _require((yield from _solid()) == '"')
        key = yield from _string()
        _require((yield from _solid()) == ":")
        char = yield from _solid()
        if key == "name" and name is None and char == '"':
            name = _checked((yield from _string()))
            if held is not None:
                begun = True
                calls.begin(name)
                calls.arguments("".join(held))
                calls.end()
        elif key == "arguments" and not begun and held is None and char == "{":
            if name is None:
                held = []
                yield from _json(char, held.append)
            else:
                begun = True
                calls.begin(name)
                yield from _json(char, calls.arguments)
                calls.end()
        else:
            _require(char == '"' and key not in ("name", "arguments"))
            yield from _string()
        char = yield from _solid()
        if char == "}":
            break
        _require(char == ",")
    _require(begun)
    calls.close()


def _json(first: str, tell: Callable[[str], None]) -> Chars[None]:
    """The JSON value that begins with `first`; each character is told once it is known to be right."""
    scanner = JsonScanner()
    char = first
    while True:
        scanner.feed(char)
        tell(char)
        if scanner.complete:
            return
        char = yield


def _string() -> Chars[str]:
    """After its opening quote."""
    chars: list[str] = []
    yield from _json('"', chars.append)
    return str(json.loads("".join(chars)))


def _word(first: str) -> Chars[tuple[str, str]]:
    """Letters, digits, hyphens and underscores, perhaps none, and the character after them."""
    chars, char = [], first
    while _NAME_CHAR.fullmatch(char):
        chars.append(char)
        char = yield
    return "".join(chars), char


def _one_of(texts: Sequence[str], first: str) -> Chars[str]:
    """One of `texts`, none of which begins with another."""
    read = first
    while read not in texts:
        _require(any(text.startswith(read) for text in texts))
        read += yield
    return read


def _solid() -> Chars[str]:
    """The next character that is no white space."""
    while True:
        char = yield
        if char not in _SPACE:
            return char


def _checked(name: str) -> str:
    _require(_NAME.fullmatch(name) is not None)
    return name


def _require(holds: bool) -> None:
    if not holds:
        raise NotACallError
