"""What only a model that knows something can show: a constrained answer is still the model's answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.conformance.asking import Ask, forced
from tests.e2e.running import Server

pytestmark = pytest.mark.demo
QUESTION: dict[str, Any] = {"model": "mixserve-demo", "temperature": 0}
FRANCE = "What is the capital of France?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def demo_client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def ask(request: pytest.FixtureRequest, demo_client: openai.OpenAI) -> Ask:
    return Ask(demo_client, stream=request.param)


def test_a_choice_is_the_likeliest(ask: Ask) -> None:
    answers = [f"The capital of France is {city}." for city in ("Berlin", "London", "Paris", "Rome")]
    assert ask.chat(FRANCE, extra=forced(*answers), **QUESTION).only.text == answers[2]


def test_a_schema_is_filled_in(ask: Ask) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 30}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    choice = ask.chat(f"{FRANCE} Answer in JSON.", response_format=wanted, **QUESTION).only
    assert choice.finish_reason == "stop"
    assert json.loads(choice.text) == {"capital": "Paris"}


def test_a_tool_is_called_with_what_was_asked_for(ask: Ask) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = ask.chat("What is the weather in Paris?", tools=[TOOL], tool_choice=named, **QUESTION).only
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.calls[0].arguments) == {"city": "Paris"}


def test_stop_and_logprobs_of_ordinary_tokens(ask: Ask) -> None:
    """Tokens of several bytes: their bytes make the text, and a stop string may end within one."""
    choice = ask.chat(FRANCE, logprobs=True, **QUESTION).only
    assert "Paris" in choice.text
    assert b"".join(bytes(entry.bytes or ()) for entry in choice.entries).decode() == choice.text
    cut = ask.chat(FRANCE, stop="ari", **QUESTION).only
    assert (cut.text, cut.finish_reason) == (choice.text[: choice.text.index("ari")], "stop")
