"""X-Request-Id: in when it is short and plain, out always."""

from __future__ import annotations

import pytest

from tests.server.harness import Live


@pytest.mark.parametrize("given", ["a", "req-1:2/3.4_5+6=7@8", "x" * 128])
def test_a_plain_request_id_comes_back(server: Live, given: str) -> None:
    for path in ("/health", "/v1/nothing"):
        assert server.client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "x" * 1024, "a b", "a\tb", "a;b", "né", 'a"b', "a\\b"])
def test_any_other_is_replaced(server: Live, given: str | None) -> None:
    headers = [] if given is None else [(b"X-Request-Id", given.encode("latin-1"))]
    ids = {server.client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(request_id.startswith("req_") and len(request_id) == 36 for request_id in ids)


def test_a_stream_has_a_request_id(server: Live) -> None:
    response = server.post("/v1/completions", {"prompt": "Hi", "stream": True}, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_refusals_have_one(locked: Live) -> None:
    headers = {"X-Request-Id": "mine"}
    assert locked.client.get("/v1/models", headers=headers).headers["x-request-id"] == "mine"
    assert locked.client.get("/v1/models").headers["x-request-id"].startswith("req_")
