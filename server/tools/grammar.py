"""Grammars in which calls are written: what tool_choice demands, put into llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.grammar import GrammarSpec
from server.protocol.tools import Tool
from server.tools.formats import CallFormat

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As templates write the JSON of calls, so that it is what models know; and no call is endless for its white space."""
_ANY_OBJECT = {"type": "object"}
_TERMINALS = "SPACE: / ?/\nTEXT: /(?s:.*)/\n"


def calls_only(form: CallFormat, tools: Sequence[Tool], *, parallel: bool) -> GrammarSpec:
    """One call of one of `tools`, or with `parallel` one and more; arguments are valid under their schemas."""
    return GrammarSpec.lark(f"start: SPACE calls\n{_calls(form, tools, parallel=parallel, valid=True)}{_TERMINALS}")


def answer_or_calls(
    form: CallFormat, tools: Sequence[Tool], schema: Mapping[str, Any] | bool, *, parallel: bool
) -> GrammarSpec:
    """JSON that is valid under `schema`, or calls, whose arguments may be any object."""
    calls = _calls(form, tools, parallel=parallel, valid=False)
    return GrammarSpec.lark(f"start: SPACE (answer | calls)\nanswer: {_json(schema)}\n{calls}{_TERMINALS}")


def text_and_one_call(form: CallFormat, tools: Sequence[Tool]) -> GrammarSpec:
    """Any text, and up to one call at its end, whose arguments may be any object."""
    if form.marker in form.control_ids:
        start = "start: TEXT calls?\n"
    else:
        # What comes after the marker's text is no longer free, and nothing is free without it.
        start = f"start: text | before after_marker\ntext: TEXT\nbefore[lazy]: TEXT {_quoted(form.marker)}\n"
    return GrammarSpec.lark(f"{start}{_calls(form, tools, parallel=False, valid=False)}{_TERMINALS}")


def _calls(form: CallFormat, tools: Sequence[Tool], *, parallel: bool, valid: bool) -> str:
    """Rules for `calls`, which is a marker and `after_marker`."""
    rules = [f"calls: {_sign(form, form.marker)} after_marker"]
    if form.name == "mistral":
        more = '(", " call)*' if parallel else ""
        rules.append(f'after_marker: SPACE "[" call {more} "]"')
    else:
        opening, closing = _sign(form, "<tool_call>"), _sign(form, "</tool_call>")
        more = f'("\\n" {opening} "\\n" call "\\n" {closing})*' if parallel else ""
        rules.append(f'after_marker: "\\n" call "\\n" {closing} {more}')
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        function = tool.function
        schema = arguments_schema(tool) if valid else _ANY_OBJECT
        head = _quoted(f'{{"name": "{function.name}", "arguments": ')
        rules.append(f'call_{index}: {head} {_json(schema)} "}}"')
    return "\n".join(rules) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What the arguments of a demanded call are valid under."""
    return _ANY_OBJECT | (tool.function.parameters or {})


def _sign(form: CallFormat, marker: str) -> str:
    token_id = form.control_ids.get(marker)
    return _quoted(marker) if token_id is None else f"<[{token_id}]>"


def _json(schema: Mapping[str, Any] | bool) -> str:
    schema = {} if schema is True else {"enum": []} if schema is False else schema
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACING}, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text)
