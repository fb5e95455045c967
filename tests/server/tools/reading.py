"""Answers as a parser sees them, for tests: texts cut into pieces, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from server.tools.formats import CallFormat
from server.tools.parser import CallArguments, CallBegun, CallParser, Piece, Said

MARKERS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool_call>", "</tool_call>")
F = '{"name": "f", "arguments": {}}'
G = '{"name": "g_2", "arguments": {"a": "}]</", "b": [1, {"c": null}]}}'


def as_stream(text: str, form: CallFormat) -> str:
    """`text` as an answer's stream has it: with signs for the markers that are control tokens."""
    for sign, marker in form.signs.items():
        text = text.replace(marker, sign)
    return text


def parse(
    form: CallFormat, text: str, cuts: Sequence[int] = (), *, shows_special: bool = False
) -> tuple[CallParser, list[list[Piece]]]:
    """The pieces of each push, and of the end."""
    parser = CallParser(form, shows_special=shows_special)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pushes = [parser.push(text[start:end]) for start, end in pairwise(edges)]
    return parser, [*pushes, parser.finish()]


def outcome(parser: CallParser, pushes: list[list[Piece]]) -> tuple[str, list[tuple[str, str]], int]:
    """Content, calls as (name, arguments), and how many were whole."""
    content, ids = "", set()
    calls: list[tuple[str, str]] = []
    for piece in [piece for push in pushes for piece in push]:
        match piece:
            case Said(text):
                assert text
                content += text
            case CallBegun(index, call_id, name):
                assert index == len(calls)
                ids.add(call_id)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1, "the arguments of the last call go on"
                assert text
                calls[index] = (calls[index][0], calls[index][1] + text)
    assert len(ids) == len(calls)
    return content, calls, parser.num_whole


def read(form: CallFormat, text: str, **options: Any) -> tuple[str, list[tuple[str, str]], int]:
    return outcome(*parse(form, as_stream(text, form), **options))


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def arguments(call: str) -> str:
    """Their text in a call that ends with them."""
    return call[call.index("{", 1) : -1]
