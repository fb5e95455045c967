"""Schemas, expressions and grammars that make no sense or never end (row H16), beside four good streams.

Each is a 400 within two seconds, and the process that looked at it is gone.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.bad_cases import CHAT, COMPLETIONS, MODEL
from tests.e2e.error_answers import check_error
from tests.e2e.good_streams import GoodStreams, unharmed
from tests.e2e.running import Server, running_server

SOON = 2.0


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    with running_server(str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32") as server:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            ask(client, {"response_format": {"type": "json_object"}})  # whatever a first grammar starts
        yield server


@pytest.fixture(scope="module")
def streams(server: Server) -> Iterator[GoodStreams]:
    with unharmed(server, MODEL) as streams:
        yield streams
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) <= 2, f"beside the engine and one that tries grammars: {children}"


@pytest.fixture
def client(server: Server, streams: GoodStreams) -> Iterator[httpx.Client]:
    """Afterwards the engine still obeys a grammar, and nobody noticed anything."""
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client
        assert client.get("/health").status_code == 200
        assert ask(client, {"structured_outputs": {"choice": ["yes", "no"]}}).json()["choices"][0]["text"] in (
            "yes",
            "no",
        )
    streams.check()


def ask(client: httpx.Client, fields: dict[str, Any], path: str = COMPLETIONS) -> httpx.Response:
    prompt = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    return client.post(path, json={"model": MODEL, "max_tokens": 64} | prompt | fields)


def refused(client: httpx.Client, fields: dict[str, Any], path: str = COMPLETIONS) -> str:
    """The message of the 400 that names the only one of `fields`."""
    start = time.monotonic()
    response = ask(client, fields, path)
    seconds = time.monotonic() - start
    message: str = check_error(response, 400, param=next(iter(fields)), code=None)["message"]
    assert seconds < SOON, f"{seconds:.1f} s: {message}"
    return message


FORMATS: dict[str, Any] = {
    "no schema": {"type": "json_schema"},
    "an empty one": {"type": "json_schema", "json_schema": {}},
    "a name alone": {"type": "json_schema", "json_schema": {"name": "x"}},
    "a schema alone": {"type": "json_schema", "json_schema": {"schema": {}}},
    "a bad name": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
    "null": {"type": "json_schema", "json_schema": None},
    "a schema of text": {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}},
    "a schema of a list": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}},
    "no type": {},
    "another type": {"type": "xml"},
    "a string": "json_object",
    "a list": [{"type": "json_object"}],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("response_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_format_without_a_schema(client: httpx.Client, path: str, response_format: Any, stream: bool) -> None:
    refused(client, {"response_format": response_format, "stream": stream}, path)


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


SCHEMAS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "two in a circle": {"$defs": {"a": ref("b"), "b": ref("a")}, **ref("a")},
    "a circle of allOf": {"$defs": {"a": {"allOf": [ref("a")]}}, **ref("a")},
    "a circle of anyOf": {"$defs": {"a": {"anyOf": [ref("a"), ref("a")]}}, **ref("a")},
    "a part that needs itself": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "a list of one of itself": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "parts that need each other": {
        "$defs": {
            "a": {"type": "object", "properties": {"b": ref("b")}, "required": ["b"]},
            "b": {"type": "array", "prefixItems": [ref("a")], "minItems": 1},
        },
        **ref("a"),
    },
    "a reference to nothing": ref("nothing"),
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference that is no text": {"$ref": 5},
    "false": False,
    "no value": {"enum": []},
    "no number": {"type": "integer", "minimum": 5, "maximum": 1},
    "no length": {"type": "string", "minLength": 5, "maxLength": 2},
    "no type of that name": {"type": "wizard"},
    "a type of a number": {"type": 5},
    "properties of a list": {"type": "object", "properties": []},
    "required of a number": {"type": "object", "required": 5},
    "not": {"not": {"type": "string"}},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a pattern that looks behind": {"type": "string", "pattern": "(?<=a)b"},
    "a length beyond all measure": {"type": "string", "minLength": 10**9},
    "a list beyond all measure": {"type": "array", "items": {"type": "null"}, "minItems": 10**9},
    "lists of lists beyond all measure": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "string", "minLength": 1000}, "minItems": 1000},
        "minItems": 1000,
    },
    "300 KB": {"enum": ["x" * 300 + str(number) for number in range(1000)]},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
@pytest.mark.parametrize("field", ["response_format", "structured_outputs"])
def test_a_hopeless_schema(client: httpx.Client, field: str, schema: Any) -> None:
    if field == "response_format":
        refused(client, {field: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}, CHAT)
    else:
        refused(client, {field: {"json": schema}})
        refused(client, {field: {"json": json.dumps(schema)}})


@pytest.mark.parametrize("depth", [1000, 60_000])
@pytest.mark.parametrize("opening", ["[", '{"items": ', '{"properties": {"a": '])
def test_a_schema_that_is_deep(client: httpx.Client, depth: int, opening: str) -> None:
    """Too deep to be JSON here, as part of the request and as the text of a schema."""
    closing = {"[": "]", '{"items": ': "}"}.get(opening, "}}")
    schema = opening * depth + "{}" + closing * depth
    body = f'{{"prompt": "Hi", "structured_outputs": {{"json": {schema}}}}}'
    response = client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400, param=None, code=None)
    refused(client, {"structured_outputs": {"json": schema}})


@pytest.mark.parametrize("depth", [10, 60])
def test_a_schema_that_is_as_deep_as_people_write_them(client: httpx.Client, depth: int) -> None:
    response = ask(client, {"structured_outputs": {"json": nested(depth)}, "max_tokens": 2000, "temperature": 0})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    if choice["finish_reason"] == "stop":
        json.loads(choice["text"])


STRUCTURES: dict[str, Any] = {
    "nothing": {},
    "two": {"regex": "a", "choice": ["a"]},
    "nulls": {"regex": None, "json": None},
    "something else": {"lark": "start: A"},
    "a string": "regex",
    "no choices": {"choice": []},
    "an empty choice": {"choice": ["a", ""]},
    "a choice of numbers": {"choice": [1, 2]},
    "a choice of text": {"choice": "abc"},
    "300 KB of choices": {"choice": ["x" * 300 + str(number) for number in range(1000)]},
    "a regex of a number": {"regex": 5},
    "a regex that is none": {"regex": "("},
    "another that is none": {"regex": "a{2,1}"},
    "a regex that looks ahead": {"regex": "(?!a)b"},
    "a regex that refers back": {"regex": r"(a)\1"},
    "a regex that explodes": {"regex": "((a{1,100}){1,100}){1,100}"},
    "60,000 deep": {"regex": "(" * 60_000 + "a" + ")" * 60_000},
    "300 KB of regex": {"regex": "a" * 300_000},
    "a grammar of a number": {"grammar": 5},
    "an empty grammar": {"grammar": ""},
    "a grammar that is none": {"grammar": "start: ("},
    "a grammar without start": {"grammar": 'begin: "a"'},
    "a grammar without a rule": {"grammar": "start: nothing"},
    "a grammar of itself": {"grammar": "start: start"},
    "a grammar 60,000 deep": {"grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "60,000 rules in a row": {
        "grammar": "start: r0\n" + "".join(f"r{number}: r{number + 1}\n" for number in range(12_000)) + 'r12000: "a"'
    },
    "a grammar with a bad schema": {"grammar": 'start: %json {"$ref": "#"}'},
    "a token that is not there": {"grammar": "start: <[99999999]>"},
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_hopeless_structure(client: httpx.Client, path: str, structure: Any) -> None:
    refused(client, {"structured_outputs": structure}, path)


# What explodes where all states of an expression are listed beforehand. It may be refused, or served in good time.
HEAVY: dict[str, Any] = {
    "repeats of repeats": {"regex": "(a{1,1000}){1,1000}"},
    "repeats of repeats in a schema": {"json": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}},
    "repeats of repeats in a grammar": {"grammar": "start: A\nA: /(a{1,1000}){1,1000}/"},
    "six levels": {"regex": "(((((a{10}){10}){10}){10}){10}){10}"},
    "a billion": {"regex": "a{1000000000}"},
    "an a 500 letters ago": {"regex": "[ab]*a[ab]{500}"},
    "500 words": {"regex": "(.*a){500}"},
    "ambiguous": {"regex": "(a|a|aa|aaa|a*)*b{3}"},
    "all orders of words": {"regex": "((foo|bar|baz)+,?)*" * 50},
    "what never ends": {"grammar": 'start: "a" start'},
    "ambiguous rules": {"grammar": 'start: x\nx: x x | "a" | "b" | ""'},
    "ambiguous lists": {"grammar": "start: a a a a a a\na: b*\nb: c*\nc: /[ab]/*"},
    "500 optional properties": {
        "json": {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(500)}}
    },
    "anyOf of anyOf": {
        "json": {
            "$defs": {
                f"d{level}": {"anyOf": [{"type": "array", "items": ref(f"d{level + 1}")}, ref(f"d{level + 1}")] * 2}
                for level in range(30)
            }
            | {"d30": {"type": "null"}},
            **ref("d0"),
        }
    },
}


@pytest.mark.parametrize("structure", HEAVY.values(), ids=HEAVY.keys())
def test_a_heavy_one(client: httpx.Client, structure: Any) -> None:
    start = time.monotonic()
    response = ask(client, {"structured_outputs": structure, "max_tokens": 8})
    seconds = time.monotonic() - start
    if response.status_code != 200:
        check_error(response, 400, param="structured_outputs", code=None)
    assert seconds < SOON, f"{seconds:.1f} s: {response.text}"


def test_two_at_once(client: httpx.Client) -> None:
    body = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    response = ask(client, body)
    assert check_error(response, 400, param=response.json()["error"]["param"], code=None)["param"] in body


@pytest.mark.parametrize("field", ["$ref", "$schema", "$id", "$dynamicRef"])
def test_nothing_is_fetched(client: httpx.Client, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        response = ask(client, {"structured_outputs": {"json": {field: url, "type": "null"}}})
        if response.status_code != 200:  # a $schema or $id is only a name
            check_error(response, 400, param="structured_outputs", code=None)
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_many_hopeless_ones_at_once(client: httpx.Client) -> None:
    """They wait for each other, not for ever; a good one beside them is answered."""
    bad = {"structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}"}}
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(ask, client, bad) for _ in range(8)]
        good = pool.submit(ask, client, {"structured_outputs": {"regex": "[ab]{3}"}})
        assert good.result(timeout=20).status_code == 200
        for answer in answers:
            assert answer.result(timeout=20).status_code in (400, 503)


def checker_process(server: Server) -> psutil.Process:
    """The process that tries grammars."""
    engine = server.engine_process()
    (checker,) = [child for child in psutil.Process(server.process.pid).children() if child != engine]
    return checker


def test_a_process_that_hangs_is_ended(server: Server, client: httpx.Client) -> None:
    """As with an expression that takes for ever, whatever that may be: the process is stopped from outside."""
    assert ask(client, {"structured_outputs": {"regex": "before"}}).status_code == 200
    checker = checker_process(server)
    checker.suspend()
    assert "seconds" in refused(client, {"structured_outputs": {"regex": "meanwhile"}})
    assert not checker.is_running()
    assert ask(client, {"structured_outputs": {"regex": "after"}}).json()["choices"][0]["text"] == "after"
    assert checker_process(server) != checker


def test_a_process_that_is_killed_is_started_anew(server: Server, client: httpx.Client) -> None:
    assert ask(client, {"structured_outputs": {"regex": "before it"}}).status_code == 200
    checker_process(server).kill()
    response = ask(client, {"structured_outputs": {"regex": "after it"}})
    if response.status_code != 200:
        check_error(response, 503, param=None, code="server_overloaded")
    assert ask(client, {"structured_outputs": {"regex": "later"}}).json()["choices"][0]["text"] == "later"


GOOD_SCHEMAS: dict[str, Any] = {
    "a recursion that ends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "a tree": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"anyOf": [ref("tree"), {"type": "null"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
        **ref("tree"),
    },
    "anything": True,
}


@pytest.mark.parametrize("schema", GOOD_SCHEMAS.values(), ids=GOOD_SCHEMAS.keys())
def test_what_only_looks_hopeless(client: httpx.Client, schema: Any) -> None:
    response = ask(client, {"structured_outputs": {"json": schema}})
    assert response.status_code == 200, response.text
