"""The OpenAPI document says what the server does: each parameter of the contract with its interval and default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, SamplingDefaults, ServerConfig
from server.edge.keys import ApiKey
from tests.server.fake_engine import VOCAB_SIZE, FakeEngine
from tests.server.harness import MODEL, Live, live_server

ERROR = {"$ref": "#/components/schemas/ErrorBody"}
OPEN = {"/health", "/ready", "/version"}
ALWAYS = {"408", "413", "431", "500", "503"}
STATUSES = {
    ("post", "/v1/completions"): {"200", "400", "401", "404", "415", "429"},
    ("post", "/v1/chat/completions"): {"200", "400", "401", "404", "415", "429"},
    ("post", "/tokenize"): {"200", "400", "401", "404", "415"},
    ("post", "/detokenize"): {"200", "400", "401", "404", "415"},
    ("get", "/v1/models"): {"200", "401"},
    ("get", "/v1/models/{model_id}"): {"200", "401", "404"},
    ("get", "/v1/experts"): {"200", "400", "401"},
    ("get", "/v1/experts/events"): {"200", "401"},
    ("get", "/v1/experts/what_if"): {"200", "400", "401"},
    ("post", "/v1/experts/reset"): {"200", "400", "401"},
    ("get", "/health"): {"200"},
    ("get", "/ready"): {"200"},
    ("get", "/version"): {"200"},
    ("get", "/metrics"): {"200", "401"},
}

COUNT = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}
POSITIVE = {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31}
FLAG = {"type": "boolean"}
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": VOCAB_SIZE - 1}
TEXT = {"type": "string", "minLength": 1}
TOKEN_IDS = {"type": "array", "items": TOKEN_ID, "minItems": 1}
STOP = {"type": "string", "minLength": 1, "maxLength": 1024}
EXPERTS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 7}, "maxItems": 1024}
BOTH: dict[str, tuple[Any, Any]] = {
    "model": ({"type": "string", "const": MODEL}, None),
    "temperature": ({"type": "number", "minimum": 0, "maximum": 2}, 0.5),
    "top_p": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, 0.25),
    "top_k": ({"type": "integer", "minimum": -1, "exclusiveMaximum": 2**31}, 7),
    "min_p": ({"type": "number", "minimum": 0, "maximum": 1}, 0.125),
    "presence_penalty": ({"type": "number", "minimum": -2, "maximum": 2}, 0),
    "frequency_penalty": ({"type": "number", "minimum": -2, "maximum": 2}, 0),
    "repetition_penalty": ({"type": "number", "exclusiveMinimum": 0, "maximum": 2}, 1.5),
    "n": ({"type": "integer", "minimum": 1, "maximum": 128}, 1),
    "logit_bias": (
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,19}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 300,
        },
        None,
    ),
    "stop": ([STOP, {"type": "array", "items": STOP, "maxItems": 4}], None),
    "stop_token_ids": ({"type": "array", "items": TOKEN_ID, "maxItems": 128}, None),
    "ignore_eos": (FLAG, False),
    "min_tokens": (COUNT, 0),
    "include_stop_str_in_output": (FLAG, False),
    "skip_special_tokens": (FLAG, True),
    "seed": ({"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**63}, None),
    "stream": (FLAG, False),
    "stream_options": ({"$ref": "#/components/schemas/StreamOptions"}, None),
    "priority": ({"type": "integer", "minimum": -(2**31), "exclusiveMaximum": 2**31}, 0),
    "cache_salt": (STOP, None),
    "routing": (FLAG, False),
    "routing_prompt": (FLAG, False),
    "experts_per_token": ({"type": "integer", "minimum": 1, "maximum": 8}, None),
    "expert_min_p": ({"type": "number", "minimum": 0, "maximum": 1}, 0),
    "expert_mask": (
        [
            EXPERTS,
            {
                "type": "object",
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
                "additionalProperties": EXPERTS,
                "maxProperties": 1024,
            },
        ],
        None,
    ),
    "structured_outputs": ({"$ref": "#/components/schemas/StructuredOutputs"}, None),
    "user": ([], None),
    "metadata": ([], None),
    "store": ([], None),
    "service_tier": ([], None),
}
COMPLETIONS: dict[str, tuple[Any, Any]] = {
    "prompt": ([TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 128}, TOKEN_IDS,
                {"type": "array", "items": TOKEN_IDS, "minItems": 1, "maxItems": 128}], None),
    "max_tokens": (COUNT, 16),
    "best_of": ({"type": "integer", "minimum": 1, "maximum": 128}, None),
    "logprobs": ({"type": "integer", "minimum": 0, "maximum": 20}, None),
    "echo": (FLAG, False),
}  # fmt: skip
CHAT: dict[str, tuple[Any, Any]] = {
    "messages": (
        {"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1, "maxItems": 16384},
        None,
    ),
    "max_tokens": (POSITIVE, None),
    "max_completion_tokens": (POSITIVE, None),
    "logprobs": (FLAG, False),
    "top_logprobs": ({"type": "integer", "minimum": 0, "maximum": 20}, None),
    "parallel_tool_calls": (FLAG, True),
}
TOKENIZE: dict[str, tuple[Any, Any]] = {
    "model": BOTH["model"],
    "prompt": ({"type": "string"}, None),
    "add_special_tokens": (FLAG, True),
    "messages": CHAT["messages"],
    "add_generation_prompt": (FLAG, True),
    "return_token_strs": (FLAG, False),
}
DETOKENIZE: dict[str, tuple[Any, Any]] = {
    "model": BOTH["model"],
    "tokens": ({"type": "array", "items": TOKEN_ID}, None),
}
PARAMETERS = {
    "CompletionRequest": BOTH | COMPLETIONS,
    "ChatRequest": BOTH | CHAT,
    "TokenizeRequest": TOKENIZE,
    "DetokenizeRequest": DETOKENIZE,
    "StreamOptions": {"include_usage": (FLAG, False)},
}
TYPED_ELSEWHERE = {"response_format", "tools", "tool_choice", "functions", "function_call"}
"""Objects with a shape of their own, and what is refused: here only that they are described."""
REQUIRED = {"CompletionRequest": ["prompt"], "ChatRequest": ["messages"], "DetokenizeRequest": ["tokens"]}


@pytest.fixture(scope="module")
def page(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    defaults = SamplingDefaults(temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5)
    config = ServerConfig(
        served_model_name=MODEL, sampling_defaults=defaults, edge=EdgeConfig(api_keys=(ApiKey.of("sk-1"),))
    )
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer, config) as live:
        found: dict[str, Any] = live.client.get("/openapi.json").json()  # open, though the server has a key
        yield found


def operations(page: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
    }  # fmt: skip


def bare(schema: Any) -> Any:
    """Without what is only there to be read."""
    if isinstance(schema, dict):
        return {name: bare(value) for name, value in schema.items() if name not in ("title", "description", "default")}
    return [bare(item) for item in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize(
    ("schema", "name"), [(schema, name) for schema, table in PARAMETERS.items() for name in table]
)  # fmt: skip
def test_every_parameter_has_its_interval_and_default(page: dict[str, Any], schema: str, name: str) -> None:
    kind, default = PARAMETERS[schema][name]
    found = page["components"]["schemas"][schema]["properties"][name]
    assert len(found["description"]) > 5
    if name in REQUIRED.get(schema, []):
        assert "default" not in found
        forms = found.get("oneOf") or [found]
    else:
        assert found["default"] == default if schema.endswith("Request") else found.get("default") == default
        forms = found.get("anyOf", [])
        assert not forms or forms[-1] == {"type": "null"}, "null means absent"
        forms = forms[:-1]
    assert bare(forms) == (kind if isinstance(kind, list) else [kind])


def test_no_parameter_is_left_out(page: dict[str, Any]) -> None:
    schemas = page["components"]["schemas"]
    for name, table in PARAMETERS.items():
        assert schemas[name]["properties"].keys() - TYPED_ELSEWHERE == table.keys()
        assert schemas[name].get("required", []) == REQUIRED.get(name, [])
        for parameter in schemas[name]["properties"].keys() & TYPED_ELSEWHERE:
            assert schemas[name]["properties"][parameter]["description"]


def test_every_route_is_there_with_every_status_it_answers(page: dict[str, Any]) -> None:
    found = operations(page)
    assert {key: operation["responses"].keys() for key, operation in found.items()} == {
        key: statuses | ALWAYS for key, statuses in STATUSES.items()
    }
    assert "422" not in str(page)
    assert not {"ValidationError", "HTTPValidationError"} & page["components"]["schemas"].keys()
    for operation in found.values():
        assert operation["summary"]
        for status, response in operation["responses"].items():
            assert response["headers"]["X-Request-Id"] == {"$ref": "#/components/headers/X-Request-Id"}
            if status != "200":
                assert response["content"] == {"application/json": {"schema": ERROR}}
        if "requestBody" in operation:
            assert operation["requestBody"]["required"]
            assert operation["requestBody"]["content"].keys() == {"application/json"}


def test_what_an_answer_is(page: dict[str, Any]) -> None:
    schemas = page["components"]["schemas"]
    for (_, path), operation in operations(page).items():
        content = operation["responses"]["200"]["content"]
        if path == "/metrics":
            assert content == {"text/plain": {"schema": {"type": "string"}}}
            continue
        if path == "/v1/experts/events":
            assert content.keys() == {"text/event-stream"}
            _, event = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
            assert event["contentSchema"] == {"anyOf": [{"$ref": "#/components/schemas/LiveEvent"}, ERROR]}
            continue
        assert schemas[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]["required"]
        streams = {"/v1/completions": "Completion", "/v1/chat/completions": "ChatChunk"}
        assert ("text/event-stream" in content) == (path in streams)
        if path in streams:
            done, chunk = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
            assert done == {"const": "[DONE]"}
            assert chunk["contentSchema"] == {"anyOf": [{"$ref": f"#/components/schemas/{streams[path]}"}, ERROR]}
    assert schemas["ChatChunk"]["properties"]["object"]["const"] == "chat.completion.chunk"
    assert schemas["ErrorDetail"]["required"] == ["message", "type", "param", "code"]


def test_every_reference_leads_somewhere(page: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(page))
    assert len(found) > 30
    for reference in found:
        _, _, kind, name = reference.split("/")
        assert name in page["components"][kind]


def test_which_routes_need_the_key(page: dict[str, Any], server: Live) -> None:
    assert page["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert page["security"] == [{"bearer": []}]
    for (_, path), operation in operations(page).items():
        assert operation.get("security") == ([] if path in OPEN else None)
    without_keys = server.client.get("/openapi.json").json()
    assert without_keys["security"] == [{"bearer": []}, {}], "a key is let pass, and not asked for"


def test_the_document_is_each_request_s_own_answer(server: Live) -> None:
    answers = [server.client.get("/openapi.json", headers={"X-Request-Id": name}) for name in ("a", "b")]
    assert [answer.headers["x-request-id"] for answer in answers] == ["a", "b"]
    assert answers[0].headers["content-type"] == "application/json"
    assert answers[0].content == answers[1].content


def test_behind_a_proxy_the_document_names_its_prefix(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(root_path="/mixserve"))
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer, config) as live:
        assert live.client.get("/mixserve/openapi.json").json()["servers"] == [{"url": "/mixserve"}]


def test_query_and_path_parameters(page: dict[str, Any]) -> None:
    (factor,) = page["paths"]["/v1/experts/what_if"]["get"]["parameters"]
    assert factor["required"]
    assert factor["description"]
    assert bare(factor["schema"]) == {"type": "number", "exclusiveMinimum": 0}
    (model,) = page["paths"]["/v1/models/{model_id}"]["get"]["parameters"]
    assert bare(model["schema"]) == {"type": "string", "const": MODEL}


def test_examples_are_good_requests(page: dict[str, Any], server: Live) -> None:
    """What the page's Try it out sends."""
    tried = 0
    for (_, path), operation in operations(page).items():
        if "requestBody" in operation:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for example in page["components"]["schemas"][reference.rpartition("/")[2]]["examples"]:
                assert server.post(path, example).status_code == 200
                tried += 1
    assert tried == 6
