"""From a request's grammar to the engine's, and what is refused on the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from engine.errors import InvalidRequestError
from engine.grammar import GrammarSpec
from engine.grammar.spec import MAX_SOURCE_BYTES
from engine.text import Tokenizer
from tests.engine.grammar.hopeless import SLOW
from tests.server.conftest import ANSWER
from tests.server.fake_engine import EOS, VOCAB_SIZE, FakeEngine
from tests.server.harness import GoodStreams, Live, error_of, live_server

SCHEMA = {"type": "object", "properties": {"größe": {"enum": ['"', 1.5, None]}}, "required": ["größe"]}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def post(server: Live, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Ask for an answer, whole or streamed; a refusal is the same."""

    def ask(path: str, **fields: Any) -> Any:
        return server.post(path, PATHS[path] | {"stream": request.param} | fields)

    return ask


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


GOOD: list[tuple[dict[str, Any], GrammarSpec]] = [
    ({"response_format": {"type": "json_object"}}, GrammarSpec.json_object()),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        GrammarSpec.json_schema(SCHEMA),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, GrammarSpec.json_schema(SCHEMA)),
    ({"structured_outputs": {"regex": r"a/\d\n"}}, GrammarSpec.regex(r"a/\d\n")),
    ({"structured_outputs": {"choice": ["é", '"']}}, GrammarSpec.choice(["é", '"'])),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, GrammarSpec.lark('root ::= "a"')),
]


@pytest.mark.parametrize(("fields", "spec"), GOOD, ids=[str(case[0]) for case in GOOD])
def test_the_engine_gets_the_grammars_text(
    server: Live, post: Callable[..., Any], path: str, fields: dict[str, Any], spec: GrammarSpec
) -> None:
    assert post(path, n=2, **fields).status_code == 200
    assert [request.grammar for request in server.engine.requests] == [spec.source()] * 2


def test_without_one_it_gets_none(server: Live, post: Callable[..., Any], path: str) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}):
        assert post(path, **fields).status_code == 200
    assert [request.grammar for request in server.engine.requests] == [None] * 3


def test_the_engine_knows_the_tokens(server: Live, tokenizer: Tokenizer) -> None:
    vocabulary = server.engine.vocabulary
    assert len(vocabulary.pieces) == VOCAB_SIZE
    assert vocabulary.pieces[EOS] == b"</s>"
    assert EOS in vocabulary.special_ids
    assert vocabulary.eos_token_ids == (EOS,)
    for text in ("日本", " naïve", "x"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(vocabulary.pieces[token_id] for token_id in ids).lstrip() == text.encode().lstrip()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
    (
        {"json": {"type": "array", "uniqueItems": True, "contains": {}}},
        'Unimplemented keys: ["contains", "uniqueItems"]',
    ),
    ({"json": {"$ref": "https://example.com/a.json"}}, "Resource 'https://example.com/a.json' is not present"),
    ({"json": {"type": "flot"}}, "Invalid type: flot"),
    ({"json": False}, "Unsatisfiable schema"),
    (
        {"json": {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}},
        "every answer to this schema has",
    ),
    ({"json": {"type": "array", "minItems": 10**9}}, "every answer to this schema has at least 2000000001 characters"),
    ({"json": {"const": "a" * MAX_SOURCE_BYTES}}, "the grammar is 262157 characters long"),
    ({"regex": "(a"}, "invalid regex: unclosed group"),
    ({"regex": "(?=a)"}, "invalid regex: look-around"),
    ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, "lexer error: too many expressions constructed"),
    ({"choice": ["a" * MAX_SOURCE_BYTES]}, "the grammar is 262148 characters long"),
    ({"choice": ["é" * (MAX_SOURCE_BYTES // 2)]}, "the grammar is 2621"),
    ({"grammar": 'stort: "a"'}, "no start rule found"),
    ({"grammar": 'start: "a"\nstart: "b"'}, 'line 2, column 8: duplicate rule: "start"'),
    ({"grammar": '%llguidance {}\nstart: "a"'}, "a grammar may not set %llguidance options"),
    ({"grammar": 'root ::= "a'}, "the grammar is no GBNF: Unexpected end of input at line 1"),
]


@pytest.mark.parametrize(("asked", "message"), BAD, ids=[case[1] for case in BAD])
def test_a_grammar_that_cannot_be_used(
    server: Live, post: Callable[..., Any], path: str, asked: dict[str, Any], message: str
) -> None:
    error = error_of(post(path, structured_outputs=asked), 400)
    assert (error["param"], error["code"]) == ("structured_outputs", None)
    assert error["message"].startswith(f"structured_outputs: {message}")
    assert error["message"].endswith(".")
    assert server.engine.requests == []
    if "json" in asked:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": asked["json"]}}
        error = error_of(post(path, response_format=wanted), 400)
        assert (error["param"], error["code"]) == ("response_format", None)
        assert error["message"].startswith(f"response_format: {message}")


def test_other_mistakes_are_told_first_or_as_well(server: Live, post: Callable[..., Any], path: str) -> None:
    error = error_of(post(path, temperature=5, structured_outputs={"regex": "a"}), 400)
    assert error["param"] == "temperature"
    error = error_of(post(path, model="other", structured_outputs={"regex": "("}), 404)
    assert error["code"] == "model_not_found"
    assert server.engine.requests == []


@pytest.fixture(scope="module")
def own_server(tokenizer: Tokenizer) -> Iterator[Live]:
    """With an engine that takes its time. It leaves no process."""
    before = {*psutil.Process().children()}
    answer = tokenizer.encode(ANSWER.strip(), add_special_tokens=False)
    with live_server(lambda: FakeEngine(lambda _: answer, step_seconds=0.005), tokenizer) as live:
        yield live
    assert {*psutil.Process().children()} <= before


def test_a_hopeless_schema_beside_good_streams(own_server: Live) -> None:
    """H16: a 400 within two seconds, and nobody else notices."""
    live = own_server
    live.complete(structured_outputs={"regex": "warm"})
    good = GoodStreams(live)
    try:
        for wanted in (SLOW.text, SLOW.text.replace("k1", "x1")):
            begin = time.monotonic()
            response = live.post("/v1/completions", {"prompt": "Hi", "structured_outputs": {"json": wanted}})
            assert time.monotonic() - begin < 2
            error = error_of(response, 400)
            assert error["param"] == "structured_outputs"
            assert "takes more than 1.2 seconds to compile" in error["message"]
            live.complete(structured_outputs={"choice": [wanted[:100]]})
    finally:
        good.stop()
    assert good.errors == []
    assert len(good.texts) > 8
    assert {*good.texts} == {ANSWER}


def test_a_known_grammar_is_served_while_a_hopeless_one_is_tried(own_server: Live) -> None:
    live = own_server
    live.complete(structured_outputs={"regex": "known"})
    statuses: list[int] = []

    def ask() -> None:
        hopeless = {"prompt": "Hi", "structured_outputs": {"json": SLOW.text.replace("k2", "y2")}}
        statuses.append(live.post("/v1/completions", hopeless).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    for _ in range(3):
        live.complete(structured_outputs={"regex": "known"})
    assert statuses == []
    thread.join(10)
    assert statuses == [400]


def test_too_many_in_line_is_a_503(own_server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar.checker.MAX_WAITING", 0)
    response = own_server.post("/v1/completions", {"prompt": "Hi", "structured_outputs": {"regex": "not yet known"}})
    error = error_of(response, 503)
    assert error["code"] == "server_overloaded"
    assert int(response.headers["retry-after"]) >= 1
    own_server.complete(structured_outputs={"regex": "known"})


def test_a_grammar_that_is_too_slow_to_follow_is_its_senders_fault(tokenizer: Tokenizer) -> None:
    """Seen before the first token it is a 400, later the last event; either names the field."""
    failure = InvalidRequestError("the grammar takes too long to follow; make it simpler", param="grammar")

    def failing(after: int) -> FakeEngine:
        engine = FakeEngine(lambda _: [5, 6, 7, 8], fail_at=after)
        engine.failure = failure
        return engine

    body = {"prompt": "Hi", "structured_outputs": {"regex": "a*"}}
    with live_server(lambda: failing(0), tokenizer) as live:
        for stream in (False, True):
            error = error_of(live.post("/v1/completions", body | {"stream": stream}), 400)
            assert (error["message"], error["param"]) == (str(failure), "structured_outputs")
    with live_server(lambda: failing(2), tokenizer) as live:
        *_, last = live.events("/v1/completions", body)
        assert json.loads(last)["error"]["param"] == "structured_outputs"
