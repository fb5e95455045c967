"""What goes wrong with a grammar."""

from __future__ import annotations

import re

MAX_MESSAGE_CHARS = 300

_POSITION = re.compile(r"\A(?:at )?(\d+)\((\d+)\): (failed to compile JSON schema: |(?=invalid regex))?")
"""Line and column. Of a schema or an expression, its author did not write that line."""

_PARSE_ERROR = r"regex parse error:\n.*\nerror: "
_REGEX = re.compile(rf'invalid regex "[^\n]*" \(in regex\): (?:{_PARSE_ERROR})?|{_PARSE_ERROR}', re.DOTALL)
"""What goes before the reason: the whole expression, and once more."""

_QUOTE = re.compile(r"<state>|<non-verbose/>|\n\s*\d+ \| |:\s+\(And | in regex /|\. Enable 'coerce_one_of'")
"""Where llguidance begins to write the state of its parser, pieces of the grammar, or options that no caller has."""


class GrammarError(Exception):
    """A grammar cannot be used, or not any longer; the message is one line."""

    def __init__(self, message: str) -> None:
        if message.startswith("panic: "):  # an assertion of llguidance's about what it can hold
            message = "the grammar is too large"
        if message.startswith("NoExtension"):
            message = "no text of this vocabulary goes on as the grammar wants"
        message = _REGEX.sub("invalid regex: ", _POSITION.sub(_position, message))
        text = " ".join(_QUOTE.split(message, maxsplit=1)[0].split())
        super().__init__(text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 3]}...")


def _position(found: re.Match[str]) -> str:
    line = int(found[1]) - 1  # the first one is not the author's (engine/grammar/spec.py)
    return f"line {line}, column {found[2]}: " if found[3] is None else ""
