"""Requests that do not go on (row H4), beside four good streams: the server's times, made short, and what it keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from tests.e2e.error_answers import check_error
from tests.e2e.raw import JSON, connection, exchange, head, read_answer
from tests.server.conftest import MIXTRAL
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, GoodStreams, Live, live_server

COMPLETIONS = "/v1/completions"
SECONDS = 0.3
LENGTH = ("Content-Length", "100")
CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    tokenizer = Tokenizer.load(MIXTRAL)
    answer = tokenizer.encode("Hello from the fake engine.", add_special_tokens=False)
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(body_seconds=SECONDS, header_seconds=SECONDS))
    with live_server(lambda: FakeEngine(lambda _: answer, step_seconds=0.005), tokenizer, config) as live:
        live.complete()
        before = num_tasks(live)
        good = GoodStreams(live)
        try:
            yield live
        finally:
            good.stop()
        assert good.errors == []
        assert len(good.texts) > 4
        assert set(good.texts) == {" Hello from the fake engine."}
        live.client.close()
        deadline = time.monotonic() + 5
        while (now := num_tasks(live)) > before:
            assert time.monotonic() < deadline, f"{now} tasks, but {before} at the start"
            time.sleep(0.05)
        assert live.call(lambda: live.engine.stats.num_running) == 0
        assert live.call(lambda: live.engine.stats.num_free_blocks == live.engine.info.num_blocks)
        assert live.service.num_inflight == 0


def num_tasks(live: Live) -> int:
    return live.call(lambda: len(asyncio.all_tasks()))


def slowly(*parts: bytes) -> Iterator[bytes]:
    """Byte by byte, so that something moves all the time."""
    for part in parts:
        for index in range(len(part)):
            yield part[index : index + 1]
            time.sleep(SECONDS / 10)


@pytest.mark.parametrize(
    "pieces",
    [
        [head("POST", COMPLETIONS, JSON, LENGTH)],
        [head("POST", COMPLETIONS, JSON, LENGTH), b'{"prompt": "Hi'],
        [head("POST", "/v1/chat/completions", JSON, LENGTH), b'{"messages": ['],
        [head("POST", COMPLETIONS, JSON, CHUNKED)],
        [head("POST", COMPLETIONS, JSON, CHUNKED), b"5\r\n"],
        [head("POST", COMPLETIONS, JSON, CHUNKED), b'10\r\n{"prompt": "Hi"}\r\n'],
        [head("POST", COMPLETIONS, JSON, LENGTH, ("Expect", "100-continue"))],
    ],
    ids=["no body", "half", "half of a chat", "no chunk", "no data", "no last chunk", "waits for 100"],
)
def test_a_body_that_stalls(live: Live, pieces: Iterable[bytes]) -> None:
    start = time.monotonic()
    with connection(live.url) as sock:
        for piece in pieces:
            sock.sendall(piece)
        answer = read_answer(sock)
        if answer.status_code == 100:
            answer = read_answer(sock)
        error = check_error(answer, 408, param=None, code=None)
        assert SECONDS / 2 < time.monotonic() - start < SECONDS + 5
        assert "0.3 seconds" in error["message"]
        assert sock.recv(1) == b"", "the connection is closed"


def test_a_body_that_trickles(live: Live) -> None:
    start = time.monotonic()
    body = b'{"prompt": "Hi"' + b" " * 84 + b"}"
    check_error(exchange(live.url, slowly(head("POST", COMPLETIONS, JSON, LENGTH), body)), 408, param=None, code=None)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: b", b"GET /hea", b"G"])
def test_headers_that_stall(live: Live, sent: bytes) -> None:
    check_error(exchange(live.url, [sent]), 408, param=None, code=None)


def test_a_connection_on_which_nothing_comes(live: Live) -> None:
    with connection(live.url) as sock:
        assert sock.recv(1) == b""
