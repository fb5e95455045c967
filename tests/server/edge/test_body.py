"""Limits of a body: its size, however it is sent, and its time."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator

import pytest
from starlette.types import Message

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.body import BodyLimits
from tests.e2e.raw import JSON, chunked, connection, exchange, head, post, read_answer
from tests.server.edge.asgi import call, reads_all
from tests.server.edge.conftest import metric
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

SECONDS = 0.4
GOOD = b'{"prompt": "Hi"}'


def limits(max_bytes: int = 10) -> BodyLimits:
    return BodyLimits(reads_all, max_bytes, 5.0, lambda _: None)


@pytest.mark.parametrize("body", [[b"x" * 10], [b"x"] * 10, [b"", b"x" * 9, b"x"]])
def test_a_body_at_the_limit_comes_in_one_piece(body: list[bytes]) -> None:
    assert call(limits(), body=body)[1]["body"] == b"10 in 1"


@pytest.mark.parametrize("body", [[b"x" * 11], [b"x"] * 11, [b"x" * 10, b"", b"x"], [b"x"] * 1000])
def test_a_body_over_the_limit_never_reaches_the_app(body: list[bytes]) -> None:
    counted: list[str] = []

    async def app(*_: object) -> None:
        raise AssertionError("it did")

    start, answer = call(BodyLimits(app, 10, 5.0, counted.append), body=body)
    assert start["status"] == 413
    assert "10 bytes" in json.loads(answer["body"])["error"]["message"]
    assert counted == ["invalid_request"]


@pytest.mark.parametrize("length", [b"11", b"9" * 5000])
def test_a_body_that_says_that_it_is_too_large_is_not_read(length: bytes) -> None:
    counted: list[str] = []
    app = BodyLimits(reads_all, 10, 0.0, counted.append)  # no time to read anything: that would be a 408
    start, _ = call(app, headers=[(b"content-length", length)], body=[])
    assert start["status"] == 413
    assert counted == ["invalid_request"]


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"0")]])
def test_nothing_is_waited_for_where_there_is_no_body(headers: list[tuple[bytes, bytes]]) -> None:
    assert call(limits(0), headers=headers)[0]["status"] == 200


def test_a_client_that_leaves_in_its_body_is_not_answered() -> None:
    async def app(*_: object) -> None:
        raise AssertionError("half a body reached the app")

    assert call(BodyLimits(app, 10, 5.0, lambda _: None), body=[b"x"], leaves=True) == []


def test_many_pieces_cost_no_more_than_their_bytes() -> None:
    num_pieces = 200_000
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal num_pieces
        num_pieces -= 1
        return {"type": "http.request", "body": b"%05d" % (num_pieces % 100_000), "more_body": num_pieces > 0}

    async def send(message: Message) -> None:
        sent.append(message)

    async def main() -> None:
        scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}
        await BodyLimits(reads_all, 1_000_000, 60.0, lambda _: None)(scope, receive, send)

    tracemalloc.start()
    try:
        asyncio.run(main())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent[1]["body"] == b"1000000 in 1"
    assert peak < 4_000_000, "the pieces themselves, if kept, are 38 bytes each"


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(body_seconds=SECONDS, header_seconds=1.0))
    with live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live:
        yield live


def closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1000) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/health", "/nothing"])
@pytest.mark.parametrize("part", [b"", GOOD[:-1]])
def test_a_body_that_stalls(live: Live, path: str, part: bytes) -> None:
    before = metric(live, 'requests_rejected_total{model_name="org/fake-model",reason="invalid_request"}')
    with connection(live.url, seconds=5) as sock:
        start = time.monotonic()
        sock.sendall(head("POST", path, JSON, ("Content-Length", str(len(GOOD)))) + part)
        answer = read_answer(sock)
        assert SECONDS <= time.monotonic() - start < SECONDS + 2
        assert answer.status_code == 408
        assert answer.headers["connection"] == "close"
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
        assert "0.4 seconds" in error["message"]
        assert closed(sock)
    after = metric(live, 'requests_rejected_total{model_name="org/fake-model",reason="invalid_request"}')
    assert after == before + 1


def test_a_body_that_trickles_gains_no_time(live: Live) -> None:
    with connection(live.url, seconds=5) as sock:
        start = time.monotonic()
        sock.sendall(head("POST", "/v1/completions", JSON, ("Transfer-Encoding", "chunked")))
        sock.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - start < 5:
            sock.sendall(b"1\r\n \r\n")
            try:
                answer = sock.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start < SECONDS + 2


def test_bodies_in_small_pieces_and_slow_are_read(live: Live) -> None:
    with connection(live.url) as sock:
        request = post("/v1/completions", GOOD)
        for start in range(0, len(request), 20):
            sock.sendall(request[start : start + 20])
            time.sleep(0.01)
        assert read_answer(sock).status_code == 200
    pieces = chunked(GOOD[:-1] + b" " * 300_000 + b"}", 1)
    answer = exchange(live.url, [head("POST", "/v1/completions", JSON, ("Transfer-Encoding", "chunked")), *pieces])
    assert answer.status_code == 200


def test_the_next_request_of_a_connection_is_read_after_a_413(live: Live) -> None:
    too_large = post("/v1/completions", b"x" * (2 * 2**20 + 1))
    with connection(live.url) as sock:
        sock.sendall(too_large)
        assert read_answer(sock).status_code == 413
        sock.sendall(post("/v1/completions", GOOD))
        assert read_answer(sock).status_code == 200
