"""The middleware: request ids, the last resort, and the limit of a body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.limits import BodyLimit, LastResort
from tests.server.harness import Live


def call(app: ASGIApp, *, headers: Sequence[tuple[bytes, bytes]] = (), body: Sequence[bytes] = (b"",)) -> list[Message]:
    """What `app` sends in answer to a body that comes in the given pieces."""
    pieces = [*body]
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": [*headers]}

    async def main() -> None:
        await app(scope, receive, send)

    asyncio.run(main())
    return sent


async def reads_all(_: Scope, receive: Receive, send: Send) -> None:
    size = 0
    more = True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.mark.parametrize("given", ["a", "req-1:2/3.4_5+6=7@8", "x" * 128])
def test_a_plain_request_id_comes_back(server: Live, given: str) -> None:
    for path in ("/health", "/v1/nothing"):
        assert server.client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "x" * 1024, "a b", "a\tb", "a;b", "né"])
def test_any_other_is_replaced(server: Live, given: str | None) -> None:
    headers = [] if given is None else [(b"X-Request-Id", given.encode("latin-1"))]
    ids = {server.client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(request_id.startswith("req_") and len(request_id) == 36 for request_id in ids)


def test_a_stream_has_a_request_id(server: Live) -> None:
    response = server.post("/v1/completions", {"prompt": "Hi", "stream": True}, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_the_last_resort() -> None:
    async def breaks(*_: object) -> None:
        raise ZeroDivisionError("secret")

    start, body = call(LastResort(breaks))
    assert start["status"] == 500
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "secret" not in error["message"]
    assert "division" not in error["message"]


def test_the_last_resort_is_too_late_in_an_answer() -> None:
    async def breaks(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(LastResort(breaks))


@pytest.mark.parametrize("body", [[b"x" * 10], [b"x"] * 10, [b"", b"x" * 9, b"x"]])
def test_a_body_at_the_limit(body: list[bytes]) -> None:
    assert call(BodyLimit(reads_all, 10), body=body)[1]["body"] == b"10"


@pytest.mark.parametrize("length", [b"11", b"9" * 5000])
def test_a_body_that_says_that_it_is_too_large_is_not_read(length: bytes) -> None:
    start, body = call(BodyLimit(reads_all, 10), headers=[(b"content-length", length)], body=[])
    assert start["status"] == 413
    assert "10 bytes" in json.loads(body["body"])["error"]["message"]


def test_a_body_that_does_not_say_so_is_read_up_to_the_limit() -> None:
    pieces = [b"x"] * 1000
    with pytest.raises(Exception, match="10 bytes"):
        call(BodyLimit(reads_all, 10), body=pieces)
