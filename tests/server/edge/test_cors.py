"""Pages of other origins: only the allowed ones may read answers, with keys or without."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.e2e.raw import exchange, head, post
from tests.server.edge.conftest import KEY
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

ORIGIN = "https://chat.example.com"
OTHER = ("Origin", "https://evil.example.com")
BODY = json.dumps({"prompt": "Hi"}).encode()


def preflight(
    method: str = "POST", origin: str = ORIGIN, headers: str = "authorization,content-type,x-stainless"
) -> bytes:
    return head(
        "OPTIONS",
        "/v1/completions",
        ("Origin", origin),
        ("Access-Control-Request-Method", method),
        ("Access-Control-Request-Headers", headers),
    )


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    edge = EdgeConfig(api_keys=(ApiKey.of(KEY),), allowed_origins=(ORIGIN,))
    with live_server(
        lambda: FakeEngine(lambda _: [5]), tokenizer, ServerConfig(served_model_name=MODEL, edge=edge)
    ) as live:
        yield live


def test_a_preflight_is_answered_before_the_key_is_asked_for(live: Live) -> None:
    answer = exchange(live.url, [preflight()])
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("request_bytes", [preflight(origin=OTHER[1]), preflight(method="DELETE")])
def test_a_preflight_that_is_refused(live: Live, request_bytes: bytes) -> None:
    answer = exchange(live.url, [request_bytes])
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"].startswith("Disallowed CORS ")
    assert answer.headers["content-type"] == "application/json"


def test_an_allowed_page_reads_answers_and_refusals(live: Live) -> None:
    key = ("Authorization", f"Bearer {KEY}")
    for request, status in (
        (post("/v1/completions", BODY, key, ("Origin", ORIGIN)), 200),
        (post("/v1/completions", BODY, ("Origin", ORIGIN)), 401),
        (post("/v1/completions", b"{", key, ("Origin", ORIGIN)), 400),
        (head("POST", "/v1/completions", key, ("Origin", ORIGIN), ("Content-Length", "99999999")), 413),
    ):
        answer = exchange(live.url, [request])
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


def test_a_failure_of_the_server_can_be_read(live: Live) -> None:
    live.call(lambda: setattr(live.engine, "fail_at", 0))
    answer = exchange(live.url, [post("/v1/completions", BODY, ("Authorization", f"Bearer {KEY}"), ("Origin", ORIGIN))])
    live.call(lambda: setattr(live.engine, "fail_at", None))
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_another_page_reads_nothing(live: Live) -> None:
    answer = exchange(live.url, [post("/v1/completions", BODY, ("Authorization", f"Bearer {KEY}"), OTHER)])
    assert "access-control-allow-origin" not in answer.headers


def test_it_is_no_way_around_the_key(live: Live) -> None:
    for request in (
        post("/v1/completions", BODY, ("Origin", ORIGIN)),
        head("OPTIONS", "/v1/completions", ("Origin", ORIGIN)),
        head("OPTIONS", "/v1/completions", ("Access-Control-Request-Method", "POST")),
    ):
        assert exchange(live.url, [request]).status_code == 401


def test_all_origins(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(allowed_origins=("*",)))
    with live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live:
        assert exchange(live.url, [preflight()]).headers["access-control-allow-origin"] == "*"
        assert exchange(live.url, [post("/v1/completions", BODY, OTHER)]).headers["access-control-allow-origin"] == "*"


def test_without_allowed_origins_no_page_reads_anything(server: Live) -> None:
    answer = exchange(server.url, [post("/v1/completions", BODY, ("Origin", ORIGIN))])
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert exchange(server.url, [preflight()]).status_code == 405
