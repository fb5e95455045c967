"""`response_format` and `structured_outputs`, through the official client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conformance.asking import MODEL, Ask

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "sizes"],
    "additionalProperties": False,
}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool
    kind: Literal["old", "new"] | None


def strict(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}


def check_city(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"city", "sizes"}
    assert found["city"] in ("Paris", "Rome")
    assert 1 <= len(found["sizes"]) <= 3
    assert all(isinstance(item, bool) for item in found["sizes"])


def test_json_schema(ask: Ask) -> None:
    for seed in range(3):
        choice = ask.chat(response_format=strict(SCHEMA), seed=seed).only
        assert choice.finish_reason == "stop"
        check_city(choice.text)
    choice = ask.complete(extra={"response_format": strict(SCHEMA)}, max_tokens=200).only
    assert choice.finish_reason == "stop"
    check_city(choice.text)


def test_every_choice_has_a_grammar_of_its_own(ask: Ask) -> None:
    for choice in ask.chat(response_format=strict(SCHEMA), n=4).choices:
        check_city(choice.text)


def test_json_object(ask: Ask) -> None:
    """Whatever the tiny model says, it begins an object; it seldom ends one."""
    bias = {str(ord(char)): 60 for char in '}"'}
    choice = ask.chat(response_format={"type": "json_object"}, logit_bias=bias).only
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)
    assert choice.text.startswith("{")


def test_the_clients_parse_gives_an_object(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "A city, please."}]
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=City).choices[0].message
    assert isinstance(parsed.parsed, City)
    with client.chat.completions.stream(model=MODEL, messages=messages, response_format=City) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("wanted", "allowed"),
    [
        ({"choice": ["yes", "no", "日本"]}, {"yes", "no", "日本"}),
        ({"regex": "[ab]{2}c?"}, {a + b + c for a in "ab" for b in "ab" for c in ("", "c")}),
        ({"grammar": 'start: "a" | "b" "c"'}, {"a", "bc"}),
        ({"json": {"enum": [1, "x", None]}}, {"1", '"x"', "null"}),
        ({"json": json.dumps({"enum": [True]})}, {"true"}),
    ],
    ids=["choice", "regex", "grammar", "json", "json as text"],
)
def test_structured_outputs(ask: Ask, wanted: dict[str, Any], allowed: set[str]) -> None:
    for call in (ask.complete, ask.chat):
        answer = call(extra={"structured_outputs": wanted}, n=8, max_tokens=30)
        assert {choice.text for choice in answer.choices} <= allowed
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_max_tokens_cuts_a_valid_prefix(ask: Ask) -> None:
    choice = ask.chat(response_format=strict(SCHEMA), max_tokens=9, temperature=0).only
    assert choice.finish_reason == "length"
    assert '{"city":"Paris"'.startswith(choice.text.replace(" ", "")) or '{"city":"Rome"'.startswith(
        choice.text.replace(" ", "")
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": strict({"type": "nonsense"})}, "response_format"),
        ({"response_format": strict({"$ref": "#/nowhere"})}, "response_format"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "((a{1,5000}){1,5000}){1,5000}"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_is_a_400(ask: Ask, fields: dict[str, Any], param: str) -> None:
    for call in (ask.complete, ask.chat):
        with pytest.raises(openai.BadRequestError) as caught:
            call(extra=fields, max_tokens=5)
        assert caught.value.param == param
