"""GET /health, /ready and /version, in every state of the engine."""

from __future__ import annotations

import pytest

from engine.text import Tokenizer
from server.version import VERSION
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Live, live_server


def get(live: Live, path: str) -> tuple[int, str]:
    response = live.client.get(path)
    body = response.json()
    return response.status_code, body["error"]["message"] if "error" in body else body["status"]


def test_healthy_and_ready(server: Live) -> None:
    assert get(server, "/health") == (200, "ok")
    assert get(server, "/ready") == (200, "ready")
    assert server.client.get("/version").json() == {"version": VERSION}


@pytest.mark.parametrize("silent", [False, True])
def test_head_is_get_without_a_body(server: Live, silent: bool) -> None:
    server.call(lambda: setattr(server.engine, "silent", silent))
    statuses = []
    for path in ("/health", "/ready", "/version"):
        answer, whole = server.client.head(path), server.client.get(path)
        assert (answer.status_code, answer.content) == (whole.status_code, b"")
        assert answer.headers["content-length"] == whole.headers["content-length"]
        statuses.append(answer.status_code)
    assert statuses == ([503, 503, 200] if silent else [200, 200, 200])


def test_an_engine_that_hangs(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "silent", True))
    for path in ("/health", "/ready"):
        status, message = get(server, path)
        assert status == 503
        assert "does not answer" in message


def test_an_engine_that_died(tokenizer: Tokenizer) -> None:
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer) as live:
        live.call(lambda: live.engine.die("the engine process was killed by SIGKILL"))
        for path in ("/health", "/ready"):
            status, message = get(live, path)
            assert status == 503
            assert "killed by SIGKILL" in message
        response = live.post("/v1/completions", {"prompt": "Hi"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_dead"
        assert "SIGKILL" not in response.text


def test_a_server_that_drains(tokenizer: Tokenizer) -> None:
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer) as live:

        def drain() -> None:
            live.service.draining = True

        live.call(drain)
        assert get(live, "/health") == (200, "ok")
        assert get(live, "/ready")[0] == 503
        for path, body in (
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ):
            response = live.post(path, body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "server_overloaded"
            assert int(response.headers["retry-after"]) >= 1
