"""The OpenAPI document: FastAPI's own, made true.

FastAPI knows parameters and their intervals. It does not know what the middleware and the error handlers answer, that
validation is 400 and not 422, which routes are open without a key, what an event stream holds, and what the model says:
its id, its vocabulary, its experts and the sampling defaults that its checkpoint asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from engine.types import EngineInfo
from server.config import SamplingDefaults, ServerConfig
from server.edge.auth import is_open
from server.protocol import fields
from server.protocol.chat import ChatChunk
from server.protocol.completion import Completion
from server.protocol.errors import ErrorBody
from server.protocol.live import LiveEvent

_VERSION = "3.2.0"
"""The first that can say what the events of a stream are."""

_REF = "#/components/schemas/"
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

_ABOUT = (
    "OpenAI's API; where OpenAI has no word, the names are vLLM's. `null` means absent everywhere, and fields that "
    "nobody knows are ignored. An unknown path is 404 and a method that a path does not have 405, both with the error "
    "object."
)
_ERRORS = {
    400: "A mistake in the request. `param` names the field; `code` is `context_length_exceeded` or null.",
    401: "No key or a wrong one: `code` is `invalid_api_key`.",
    404: "There is no such model: `code` is `model_not_found`.",
    408: "The headers or the body did not come in time.",
    413: "The body is too large.",
    415: "The Content-Type is not application/json.",
    429: "The key has as many requests at once as it may: `code` is `rate_limit_exceeded`.",
    431: "The headers are too large.",
    500: "The request failed in the server; `code` is `engine_dead` when the engine process is gone.",
    503: "Not now: the queue is full, the model is still loading, the server shuts down (`code` is "
    "`server_overloaded`), or, at /health and /ready, the engine is gone (`engine_dead`).",
}
_HEADERS: dict[str, Any] = {
    "X-Request-Id": {
        "description": "The request's own if it has up to 128 of `A-Z a-z 0-9 _ . : / + = @ -`, or a new one.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"schema": {"const": "Bearer"}},
}
_HEADERS_OF = {"401": ["WWW-Authenticate"], "429": ["Retry-After"], "503": ["Retry-After"]}


def responses(model: type[Any], *errors: int, chunk: type[Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: 200 with a `model`, or a stream of `chunk`s; and these errors, beside `EVERYWHERE`."""
    ok: dict[str, Any] = {"model": model}
    if chunk is not None:
        ok["content"] = {"text/event-stream": {"itemSchema": _event(chunk)}}
    return {200: ok} | _errors(*errors)


def stream_of(event: type[Any]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with nothing but a stream of `event`s."""
    return {200: {"content": {"text/event-stream": {"itemSchema": _event(event)}}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _event(chunk: type[Any]) -> dict[str, Any]:
    content = [{"$ref": _REF + kind.__name__} for kind in (chunk, ErrorBody)]
    data = {
        "description": "An object, in the end `[DONE]`. When the request fails on the way: an error, and no `[DONE]`.",
        "anyOf": [
            {"const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": content}},
        ],
    }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


EVERYWHERE = _errors(401, 408, 413, 431, 500, 503)
"""What the middleware and the error handlers answer on any route."""


def document(app: FastAPI, config: ServerConfig, info: EngineInfo) -> dict[str, Any]:
    """The document of all routes that `app` has by now. Takes a tenth of a second or more."""
    page = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version=_VERSION,
        description=_ABOUT,
        routes=app.routes,
        servers=[{"url": config.edge.root_path}] if config.edge.root_path else None,
    )
    page["security"] = [{"bearer": []}] if config.edge.api_keys else [{"bearer": []}, {}]
    page["components"] |= {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}, "headers": _HEADERS}
    _correct_schemas(page["components"]["schemas"], config.sampling_defaults)
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            _correct_operation(operation, needs_key=not is_open(method.upper(), path))
    for schema in _objects(page):
        _fill_in(schema, config.served_model_name, info)
        _make_bounds_whole(schema)
    return page


def _correct_operation(operation: dict[str, Any], *, needs_key: bool) -> None:
    found = operation["responses"]
    found.pop("422", None)
    if not needs_key:
        operation["security"] = []
        found.pop("401")
    operation["responses"] = dict(sorted(found.items()))
    for status, response in found.items():
        names = ["X-Request-Id", *_HEADERS_OF.get(status, ())]
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _correct_schemas(schemas: dict[str, Any], defaults: SamplingDefaults) -> None:
    for name in ("ValidationError", "HTTPValidationError"):
        schemas.pop(name, None)
    for chunk in (ChatChunk, Completion, LiveEvent):
        schema = TypeAdapter(chunk).json_schema(ref_template=_REF + "{model}")
        schemas |= schema.pop("$defs") | {chunk.__name__: schema}
    for name, schema in schemas.items():
        if name.endswith("Request"):
            for parameter in schema["properties"].keys() - set(schema.get("required", ())):
                schema["properties"][parameter].setdefault("default", None)  # FastAPI leaves null out
    for name in ("CompletionRequest", "ChatRequest"):
        for parameter, value in dataclasses.asdict(defaults).items():
            schemas[name]["properties"][parameter]["default"] = value


def _fill_in(schema: dict[str, Any], model: str, info: EngineInfo) -> None:
    """What only this model can say."""
    match schema.get("title"):
        case fields.MODEL_ID:
            schema["const"] = model
        case fields.TOKEN_ID:
            schema["maximum"] = info.vocab_size - 1
        case fields.EXPERT_ID:
            schema["maximum"] = info.num_experts - 1
        case fields.EXPERT_COUNT:
            schema["maximum"] = info.max_experts_per_tok
        case _:
            return
    schema.pop("exclusiveMaximum", None)


def _make_bounds_whole(schema: dict[str, Any]) -> None:
    """FastAPI makes every bound a float, which no longer reads as a bound of integers."""
    for key in _BOUNDS:
        if isinstance(bound := schema.get(key), float) and bound.is_integer():
            schema[key] = int(bound)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)
