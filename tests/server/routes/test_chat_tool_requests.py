"""Tools, tool choices and tool messages that are refused, each beside four good streams, and that are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import Live, error_of, live_server

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "How warm is it?"}


@pytest.fixture(scope="module")
def roomy_server(tokenizer: Tokenizer) -> Iterator[Live]:
    """With a context long enough for tools in words."""
    info = fake_info(max_model_len=2048)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live:
        yield live


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


ENDLESS = {
    "$ref": "#/$defs/A",
    "$defs": {"A": {"type": "object", "required": ["n"], "properties": {"n": {"$ref": "#/$defs/A"}}}},
}
LONG = {"properties": {"text": {"type": "string", "minLength": 100_000}}, "required": ["text"]}
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": "f"}, "tools", "tools must be a"),
        ({"tools": [5]}, "tools", "tools[0] must be an object"),
        ({"tools": [{}]}, "tools", "tools[0].type is required"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools", 'tools[0].type must be "function"'),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function is required"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "tools[0].function.name is required"),
        ({"tools": function(name="")}, "tools", "tools[0].function.name must be a string of 1 to 64"),
        ({"tools": function(name="a b")}, "tools", "tools[0].function.name must be a string of 1 to 64"),
        ({"tools": function(name="f\n")}, "tools", "tools[0].function.name must be a string of 1 to 64"),
        ({"tools": function(name="f" * 65)}, "tools", "tools[0].function.name must be a string of 1 to 64"),
        ({"tools": function(description=5)}, "tools", "tools[0].function.description must be a string"),
        ({"tools": function(parameters="{}")}, "tools", "tools[0].function.parameters must be a JSON schema"),
        ({"tools": function(parameters=[])}, "tools", "tools[0].function.parameters must be a JSON schema"),
        ({"tools": function(parameters={"type": "string"})}, "tools", "must be a JSON schema of type object"),
        ({"tools": function(strict="yes")}, "tools", "tools[0].function.strict must be true or false"),
        ({"tools": function() * 2}, "tools", "tools[1].function.name is taken: f"),
        ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, "tools", "128"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": NAMED}, "tool_choice", "no tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": function(name="g"), "tool_choice": NAMED}, "tool_choice", "names f, which is no tool"),
        ({"tools": function(), "tool_choice": "any"}, "tool_choice", "must be none, auto, required or"),
        ({"tools": function(), "tool_choice": {"type": "function"}}, "tool_choice", "must be none, auto"),
        ({"tools": function(), "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "must be none, auto"),
        ({"tools": function(), "parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false"),
        ({"functions": [{"name": "f"}]}, "functions", "functions must be absent"),
        ({"function_call": "auto"}, "function_call", "function_call must be absent"),
        (
            {"tools": function(), "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "cannot be given together with tools",
        ),
        (
            {"tools": function(parameters={"properties": {"a": {"type": "no"}}}), "tool_choice": "required"},
            "tools",
            "tools: ",
        ),
        ({"tools": function(parameters=ENDLESS), "tool_choice": "required"}, "tools", "no end"),
        ({"tools": [*function(name="g"), *function(parameters=ENDLESS)], "tool_choice": NAMED}, "tools", "no end"),
        ({"tools": function(parameters=LONG), "tool_choice": NAMED}, "tools", "at least 100011 characters"),
        (
            {"tools": function(), "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "no"}}}},
            "response_format",
            "response_format: ",
        ),
        (
            {"tools": function(), "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}}},
            "response_format",
            "no end",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(busy_server: Live, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(busy_server.post(PATH, {"messages": [USER]} | body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "body",
    [
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None, "functions": None, "function_call": None},
        {"tools": [], "parallel_tool_calls": True},
        {"tools": function(description=None, parameters=None, strict=None, more=1)},
        {"tools": function(parameters={}, strict=True)},
        {"tools": function(parameters={"type": "object", "properties": {}}), "tool_choice": "auto"},
        {"tools": function(parameters=ENDLESS), "tool_choice": "auto"},
        {"tools": [*function(name="g", parameters=ENDLESS), *function()], "tool_choice": NAMED},
    ],
)
def test_what_is_taken(roomy_server: Live, body: dict[str, Any]) -> None:
    roomy_server.chat(messages=[USER], **body)


def calling(*calls: Any, content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def given(**fields: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}} | fields


def given_arguments(arguments: Any) -> dict[str, Any]:
    return given(function={"name": "f", "arguments": arguments})


NO_ARGUMENTS: tuple[Any, ...] = (
    "",
    "f",
    "[]",
    "5",
    "null",
    "{",
    '{"a": NaN}',
    '{"a": 1e400}',
    "{}{}",
    '{"a": "\\ud800"}',
    {},
)
ANSWER = {"role": "tool", "tool_call_id": "1", "content": "21"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([calling("f")], "messages[1].tool_calls[0] must be an object"),
        ([calling(given(id=None))], "messages[1].tool_calls[0].id must be a non-empty string"),
        ([calling(given(id=""))], "messages[1].tool_calls[0].id must be a non-empty string"),
        ([calling(given(type="custom"))], 'messages[1].tool_calls[0].type must be "function"'),
        ([calling(given(function={"name": "f"}))], "messages[1].tool_calls[0].function.arguments is required"),
        ([calling(given(function={"name": "f f", "arguments": "{}"}))], "messages[1].tool_calls[0].function.name"),
        *(
            ([calling(given(), given_arguments(text))], "messages[1].tool_calls[1].function.arguments must be")
            for text in NO_ARGUMENTS
        ),
        ([calling(given_arguments('{"a":' * 300 + "1" + "}" * 300))], "arguments must be the text of a JSON object"),
        ([{"role": "assistant", "content": None}], "messages[1].content must be a string"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[1].content must be a string"),
        (
            [{"role": "user", "content": "a", "tool_calls": [given()]}],
            "messages[1].tool_calls needs the role assistant",
        ),
        ([calling(given()), {"role": "tool", "content": "21"}], "messages[2].tool_call_id is required"),
        ([calling(given()), ANSWER | {"tool_call_id": "2"}], "messages[2].tool_call_id must be the id of one"),
        ([ANSWER], "messages[1].tool_call_id must be the id of one"),
        ([calling(given()), USER, ANSWER], "messages[3].tool_call_id must be the id of one"),
        ([calling(given()), ANSWER | {"content": None}], "messages[2].content must be a string"),
        (
            [{"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}],
            "messages[1].function_call must be absent",
        ),
        ([{"role": "function", "name": "f", "content": "21"}], "messages[1].role must be one of"),
    ],
)
def test_messages_that_are_refused(busy_server: Live, messages: list[Any], words: str) -> None:
    error = error_of(busy_server.post(PATH, {"messages": [USER, *messages]}), 400)
    assert error["param"] == "messages"
    assert words in error["message"]
