"""What a request's response_format and structured_outputs ask of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from engine.grammar import GrammarSpec
from server.errors import BadRequestError
from server.protocol.chat import ChatRequest
from server.protocol.common import GenerationRequest
from server.protocol.completion import CompletionRequest

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"größe": {"enum": ['"', 1.5, None]}}, "required": ["größe"]}


def completion(**fields: Any) -> GenerationRequest:
    return CompletionRequest.model_validate({"prompt": "Hi"} | fields)


def chat(**fields: Any) -> GenerationRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]} | fields)


@pytest.fixture(params=[completion, chat])
def ask(request: pytest.FixtureRequest) -> Callable[..., GenerationRequest]:
    make: Callable[..., GenerationRequest] = request.param
    return make


def named(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | fields}


GOOD: list[tuple[str, Any, GrammarSpec | None]] = [
    ("response_format", None, None),
    ("response_format", {"type": "text"}, None),
    ("response_format", {"type": "text", "unknown": 1}, None),
    ("response_format", {"type": "json_object"}, GrammarSpec.json_object()),
    ("response_format", named(SCHEMA), GrammarSpec.json_schema(SCHEMA)),
    ("response_format", named(SCHEMA, strict=True, description="An answer."), GrammarSpec.json_schema(SCHEMA)),
    ("response_format", named(SCHEMA, strict=None), GrammarSpec.json_schema(SCHEMA)),
    ("response_format", named({}, strict=False, name="a_Z-9" * 12), GrammarSpec.json_schema({})),
    ("response_format", named(True), GrammarSpec.json_schema(True)),
    ("structured_outputs", None, None),
    ("structured_outputs", {"json": SCHEMA}, GrammarSpec.json_schema(SCHEMA)),
    ("structured_outputs", {"json": json.dumps(SCHEMA)}, GrammarSpec.json_schema(SCHEMA)),
    ("structured_outputs", {"json": " true "}, GrammarSpec.json_schema(True)),
    ("structured_outputs", {"json": False}, GrammarSpec.json_schema(False)),
    ("structured_outputs", {"regex": "a+"}, GrammarSpec.regex("a+")),
    ("structured_outputs", {"regex": ""}, GrammarSpec.regex("")),
    ("structured_outputs", {"choice": ["é", '"']}, GrammarSpec.choice(["é", '"'])),
    ("structured_outputs", {"grammar": 'start: "a"'}, GrammarSpec.lark('start: "a"')),
    ("structured_outputs", {"grammar": 'root ::= "a"'}, GrammarSpec.lark('root ::= "a"')),
    ("structured_outputs", {"regex": "a+", "json": None, "choice": None, "grammar": None}, GrammarSpec.regex("a+")),
]


@pytest.mark.parametrize(("field", "value", "spec"), GOOD, ids=[json.dumps(case[1])[:60] for case in GOOD])
def test_what_is_asked(ask: Callable[..., GenerationRequest], field: str, value: Any, spec: GrammarSpec | None) -> None:
    body = ask(**{field: value})
    assert body.grammar_spec == spec
    if spec is not None:
        assert body.grammar_param == field


BAD: dict[str, list[Any]] = {
    "response_format": [
        "json_object", 5, True, [], {}, {"type": "json"}, {"type": None}, {"type": ["json_object"]},
        {"type": "json_schema"}, {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "a"}}, {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "schema": {}}, {"type": "json_schema", "json_schema": {"name": "a", "json_schema": {}}},
        named(None), named(5), named([]), named("{}"), named({}, strict=1), named({}, strict="true"),
        *(named({}, name=name) for name in ("", "a b", "ä", "a" * 65, "a\n", "a/b", None, 5)), named({}, description=5),
    ],
    "structured_outputs": [
        "a", 5, True, [], [{"regex": "a"}], {"json": 5}, {"json": []}, {"json": [{}]}, {"regex": 5}, {"regex": ["a"]},
        {"choice": []}, {"choice": [""]}, {"choice": ["a", ""]}, {"choice": "a"}, {"choice": ["a", 5]},
        {"choice": {"a": 1}}, {"grammar": 5}, {"grammar": {}}, {"json_schema": {}}, {"json_object": True},
        {"regex": "a", "whitespace_pattern": " "},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values], ids=json.dumps
)
def test_a_wrong_form(ask: Callable[..., GenerationRequest], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as found:
        ask(**{field: value})
    assert {error["loc"][0] for error in found.value.errors()} == {field}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"regex": None},
        {"regex": "a", "choice": ["a"]},
        {"json": {}, "grammar": "a"},
        {"json": False, "regex": ""},
        {"json": "{}", "regex": "a", "choice": ["a"], "grammar": "a"},
    ],
    ids=json.dumps,
)
def test_exactly_one(ask: Callable[..., GenerationRequest], value: Any) -> None:
    with pytest.raises(BadRequestError) as found:
        ask(structured_outputs=value)
    assert found.value.param == "structured_outputs"
    assert found.value.message == "structured_outputs must have exactly one of json, regex, choice, grammar."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "structured_outputs.json is not JSON: EOF while parsing a value at line 1 column 0."),
        ("{", "structured_outputs.json is not JSON: EOF while parsing an object at line 1 column 1."),
        ("{'a': 1}", "structured_outputs.json is not JSON: key must be a string at line 1 column 2."),
        ('{"minimum": NaN}', "structured_outputs.json is not JSON: number out of range."),
        ('{"minimum": 1e999}', "structured_outputs.json is not JSON: number out of range."),
        (
            '{"enum": ' + "[" * 60_000 + "]" * 60_000 + "}",
            "structured_outputs.json is not JSON: recursion limit exceeded",
        ),
        ("[]", "structured_outputs.json must be a JSON schema."),
        ("null", "structured_outputs.json must be a JSON schema."),
        ('"text"', "structured_outputs.json must be a JSON schema."),
    ],
    ids=lambda text: text[:20],
)
def test_a_text_that_is_no_schema(ask: Callable[..., GenerationRequest], text: str, message: str) -> None:
    body = ask(structured_outputs={"json": text})
    with pytest.raises(BadRequestError) as found:
        assert body.grammar_spec
    assert found.value.param == "structured_outputs"
    assert found.value.message.startswith(message)


@pytest.mark.parametrize("asked", [{"type": "json_object"}, named({})], ids=json.dumps)
def test_not_both(ask: Callable[..., GenerationRequest], asked: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as found:
        ask(response_format=asked, structured_outputs={"regex": "a"})
    assert found.value.param == "structured_outputs"
    assert found.value.message == "structured_outputs and response_format cannot both be given."


def test_text_may_be_anything_and_so_match_a_grammar(ask: Callable[..., GenerationRequest]) -> None:
    body = ask(response_format={"type": "text"}, structured_outputs={"regex": "a"})
    assert body.grammar_spec == GrammarSpec.regex("a")
    assert body.grammar_param == "structured_outputs"
