"""What answers while the model is loading, behind the same keys and limits as the API."""

from __future__ import annotations

import json
import logging

import pytest

from server.config import EdgeConfig
from server.edge.keys import ApiKey
from server.front import Front
from tests.server.edge.asgi import call, reads_all

EDGE = EdgeConfig(api_keys=(ApiKey.of("secret"),), root_path="/mixserve", allowed_origins=("https://example.com",))
AUTH = (b"authorization", b"Bearer secret")


def status_and_headers(front: Front, path: str, *headers: tuple[bytes, bytes]) -> tuple[int, dict[bytes, bytes]]:
    start, _ = call(front, method="GET", path=path, headers=headers)
    return start["status"], dict(start["headers"])


@pytest.mark.parametrize("prefix", ["", "/mixserve"])
def test_alive_but_not_ready(prefix: str) -> None:
    front = Front(EDGE)
    assert status_and_headers(front, f"{prefix}/health")[0] == 200
    for path, headers in (
        *(("/ready", ()), ("/docs", ()), ("/page/nothing", ()), ("/v1/models", (AUTH,))),
        *(("/v1/completions", (AUTH,)), ("/v1/experts/events", (AUTH,))),
    ):
        status, found = status_and_headers(front, prefix + path, *headers)
        assert status == 503
        assert int(found[b"retry-after"]) > 0


@pytest.mark.parametrize("prefix", ["", "/mixserve"])
def test_the_page_is_there_before_the_model(prefix: str) -> None:
    front = Front(EDGE)
    for path in ("/", "/page/index.html"):
        status, found = status_and_headers(front, prefix + path)
        assert (status, found[b"content-type"]) == (200, b"text/html; charset=utf-8")
        assert b"script-src 'self'" in found[b"content-security-policy"]
    assert call(front, method="POST", path=f"{prefix}/", headers=(AUTH,))[0]["status"] == 503


def test_keys_ids_and_origins_hold_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    front = Front(EDGE)
    with caplog.at_level(logging.INFO, "server.access"):
        status, found = status_and_headers(
            front, "/v1/models", (b"x-request-id", b"mine"), (b"origin", b"https://example.com")
        )
    assert status == 401
    assert found[b"x-request-id"] == b"mine"
    assert found[b"access-control-allow-origin"] == b"https://example.com"
    assert json.loads(caplog.messages[0])["status"] == 401


def test_the_app_takes_over() -> None:
    front = Front(EdgeConfig())
    assert status_and_headers(front, "/v1/models")[0] == 503
    counted: list[str] = []
    front.count_rejected("too early")
    front.put(reads_all, counted.append)
    front.count_rejected("invalid_request")
    assert call(front)[0]["status"] == 200
    assert counted == ["invalid_request"]
