"""JsonScanner: whether a text goes on as JSON, character by character."""

from __future__ import annotations

import re

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_LITERALS = ("true", "false", "null")


class NotJsonError(ValueError):
    """The text is no JSON, whatever follows."""


class JsonScanner:
    """Reads one object, list or string by RFC 8259; a level of nesting takes one byte of memory, not of the stack.

    A wrong number is noticed at its end. U+FDD0 to U+FDEF stand for control tokens (server/tools/formats.py), which no
    JSON has.
    """

    def __init__(self) -> None:
        self.complete = False
        self._open: list[str] = []  # the closing brackets that are due
        self._expects = "value"
        self._word = ""  # a number or a literal so far
        self._in_key = False

    def feed(self, char: str) -> None:
        """Raises NotJsonError when `char` cannot come next. Nothing may be fed after the end."""
        assert not self.complete, "the value has ended"
        match self._expects:
            case "string":
                self._in_string(char)
            case "escape":
                if char not in '"\\/bfnrtu':
                    raise NotJsonError
                self._expects = "hex 4" if char == "u" else "string"
            case "hex 4" | "hex 3" | "hex 2" | "hex 1" as state:
                if char not in "0123456789abcdefABCDEF":
                    raise NotJsonError
                left = int(state[-1]) - 1
                self._expects = f"hex {left}" if left else "string"
            case "word" if char not in ",]}" and char not in _SPACE:
                self._word += char
                if self._word[0] not in "-0123456789" and not any(text.startswith(self._word) for text in _LITERALS):
                    raise NotJsonError
            case "word":
                if self._word not in _LITERALS and not _NUMBER.fullmatch(self._word):
                    raise NotJsonError
                self._expects = "comma"
                self._between(char)
            case _:
                self._between(char)

    def _in_string(self, char: str) -> None:
        if char == '"':
            self._expects = "colon" if self._in_key else "comma"
            self.complete = not self._open
        elif char == "\\":
            self._expects = "escape"
        elif char < " " or "\ufdd0" <= char <= "\ufdef":
            raise NotJsonError

    def _between(self, char: str) -> None:
        """A character outside strings, numbers and literals."""
        expects = self._expects
        if char in _SPACE:
            if not self._open:
                raise NotJsonError  # nothing has begun
        elif char == '"' and expects in ("value", "value or end", "key", "key or end"):
            self._in_key = expects.startswith("key")
            self._expects = "string"
        elif char == ":" and expects == "colon":
            self._expects = "value"
        elif char == "," and expects == "comma":
            self._expects = "key" if self._open[-1] == "}" else "value"
        elif self._open and char == self._open[-1] and expects in ("comma", "key or end", "value or end"):
            self._open.pop()
            self._expects = "comma"
            self.complete = not self._open
        elif expects.startswith("value"):
            self._begin_value(char)
        else:
            raise NotJsonError

    def _begin_value(self, char: str) -> None:
        if char == "{":
            self._open.append("}")
            self._expects = "key or end"
        elif char == "[":
            self._open.append("]")
            self._expects = "value or end"
        elif char in "-0123456789tfn" and self._open:
            self._word = char
            self._expects = "word"
        else:
            raise NotJsonError
