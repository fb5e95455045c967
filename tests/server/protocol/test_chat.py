"""Messages as templates see them. What is refused is in tests/server/routes/test_chat_tools.py."""

from __future__ import annotations

from typing import Any

import pytest

from server.protocol.chat import ChatRequest, Message, messages_to_template
from server.protocol.tools import Tool

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2.0, "é"]}'}}
OTHER = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}


def convert(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return messages_to_template([Message.model_validate(message) for message in messages])


def test_calls_have_their_arguments_as_objects() -> None:
    (message,) = convert({"role": "assistant", "tool_calls": [CALL]})
    function = {"name": "f", "arguments": {"a": [1, 2.0, "é"]}}
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


def test_answers_are_told_the_functions_name() -> None:
    """As transformers' documentation has it."""
    found = convert(
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, OTHER]},
        {"role": "tool", "tool_call_id": "2", "content": "b"},
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "", "name": "own"},
    )
    assert found[0]["content"] == "Hm."
    assert found[1:] == [
        {"role": "tool", "content": "b", "name": "g", "tool_call_id": "2"},
        {"role": "tool", "content": "a\nb", "name": "f", "tool_call_id": "1"},
        {"role": "tool", "content": "", "name": "own", "tool_call_id": "1"},
    ]


def test_null_is_absent() -> None:
    """As the official client writes out a message that it got."""
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "tool_call_id"))
    assert convert({"role": "assistant", "content": "Hm."} | nulls) == [{"role": "assistant", "content": "Hm."}]


@pytest.mark.parametrize(
    ("choice", "parallel", "offered", "demanded", "several"),
    [
        (None, None, "fg", "", True),
        ("auto", True, "fg", "", True),
        ("auto", False, "fg", "", False),
        ("none", None, "", "", True),
        ("required", None, "fg", "fg", True),
        ("required", False, "fg", "fg", False),
        ({"type": "function", "function": {"name": "g"}}, True, "fg", "g", False),
    ],
)
def test_what_a_choice_asks_for(choice: Any, parallel: bool | None, offered: str, demanded: str, several: bool) -> None:
    body = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": ""}],
            "tools": [{"type": "function", "function": {"name": name}} for name in "fg"],
            "tool_choice": choice,
            "parallel_tool_calls": parallel,
        }
    )

    def names(tools: list[Tool]) -> str:
        return "".join(tool.function.name for tool in tools)

    assert (names(body.offered_tools), names(body.demanded_tools), body.may_call_several) == (
        offered,
        demanded,
        several,
    )
