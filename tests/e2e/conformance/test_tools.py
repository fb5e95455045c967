"""Tool calling: tool_choice auto, none, required and named, whole and as deltas, and back in."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conformance.asking import MODEL, Answer, Ask

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "celsius": true}}\n</tool_call>'


def check_weather(answer: Answer) -> None:
    choice = answer.only
    assert (choice.finish_reason, choice.content_is_null) == ("tool_calls", True)
    assert choice.calls[0].name == "get_weather"
    arguments = json.loads(choice.calls[0].arguments)
    assert arguments.keys() == {"city", "celsius"}
    assert arguments["city"] in ("Paris", "Rome")
    assert isinstance(arguments["celsius"], bool)
    assert answer.usage.completion_tokens > len(choice.calls[0].arguments)


@pytest.mark.parametrize("seed", range(3))
def test_a_named_tool_is_called(ask: Ask, seed: int) -> None:
    answer = ask.chat(tools=TOOLS, tool_choice=NAMED, seed=seed)
    check_weather(answer)
    assert len(answer.only.calls) == 1


def test_required_calls_some_tool(ask: Ask) -> None:
    answer = ask.chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    check_weather(answer)
    assert len(answer.only.calls) == 1
    names = {
        call.name
        for choice in ask.chat(tools=TOOLS, tool_choice="required", n=6, max_completion_tokens=400, seed=1).choices
        for call in choice.calls
    }
    assert names
    assert names <= {"get_weather", "get_time"}


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_none_and_auto_may_answer_with_text(ask: Ask, choice: Any) -> None:
    fields = {} if choice is None else {"tool_choice": choice}
    answer = ask.chat(tools=TOOLS, **fields, max_tokens=12, extra={"ignore_eos": True}).only
    assert (answer.finish_reason, answer.calls) == ("length", [])
    assert answer.text


def test_calls_of_choices_have_ids_of_their_own(ask: Ask) -> None:
    answer = ask.chat(tools=TOOLS, tool_choice=NAMED, n=3)
    ids = [call.id for choice in answer.choices for call in choice.calls]
    assert len(ids) == len(set(ids)) == 3


def test_a_tool_read_out_of_a_schema_that_is_cut_off_is_length(ask: Ask) -> None:
    answer = ask.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=3).only
    assert answer.finish_reason == "length"


def test_tool_messages_go_back_in(ask: Ask) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    answer = ask.chat(messages=messages, tools=TOOLS, max_tokens=5)
    before = ask.chat(messages=messages[:1], tools=TOOLS, max_tokens=5)
    assert answer.usage.prompt_tokens > before.usage.prompt_tokens + len('get_weather{"city": "Rome"}Sunny.')


def test_tools_are_read_by_the_model(ask: Ask) -> None:
    without = ask.chat(max_tokens=1).usage.prompt_tokens
    assert ask.chat(tools=TOOLS, max_tokens=1).usage.prompt_tokens > without + len("The weather in a city.")
    assert ask.chat(tools=[], max_tokens=1).usage.prompt_tokens == without


def test_the_stream_helper_puts_calls_together(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Weather in Rome?"}]
    tools: Any = TOOLS[:1]
    named: Any = NAMED
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools, tool_choice=named) as stream:
        events = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    assert "tool_calls.function.arguments.done" in events
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_the_clients_parse_gives_arguments_as_an_object(client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: Literal["Paris", "Rome"]

    messages: Any = [{"role": "user", "content": "Weather in Rome?"}]
    choice: Any = {"type": "function", "function": {"name": "Weather"}}
    completion = client.chat.completions.parse(
        model=MODEL, messages=messages, tools=[openai.pydantic_function_tool(Weather)], tool_choice=choice
    )
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "get_weather"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]}, "tools"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
    ],
)
def test_what_is_refused(ask: Ask, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask.chat(extra=fields, max_tokens=200)
    assert caught.value.param == param
