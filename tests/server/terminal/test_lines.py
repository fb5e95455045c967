"""Lines into messages."""

from __future__ import annotations

import io

import pytest

from server.terminal.lines import plain_lines, read_message


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("a\\\nb\\\n\\\nc\nd", ["a\nb\n\nc", "d"]),
        ("a\\\\\nb", ["a\\\nb"]),
        ("a\\b\n", ["a\\b"]),
        ("a\\", ["a"]),
        ("a\\\nb\\", ["a\nb"]),
        ("\\\n\\\n", ["\n"]),
    ],
)
def test_messages(typed: str, messages: list[str]) -> None:
    lines = plain_lines(io.StringIO(typed))
    assert [read_message(lines) for _ in messages] == messages
    with pytest.raises(EOFError):
        read_message(lines)
