"""The access log: one line of JSON a request, without anything a client would not want to read there."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from engine.text import Tokenizer
from server.edge.access_log import AccessLog, logs_to
from server.edge.keys import ApiKey
from server.edge.request_ids import RequestIds
from tests.e2e.raw import JSON, connection, exchange, head, post, read_answer
from tests.server.edge.asgi import call
from tests.server.edge.conftest import KEY
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Live, live_server

FIELDS = ["time", "request_id", "method", "path", "status", "duration_ms", "client", "key_id", "end"]
TOKENS = ["prompt_tokens", "completion_tokens"]
AUTH = ("Authorization", f"Bearer {KEY}")


class Lines:
    """The log, which is written after the answer has gone out."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def texts(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "server.access"]

    def all(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 5
        while len(self.texts()) < count:
            assert time.monotonic() < deadline, f"{self.texts()}: not {count}"
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(self.texts()) == count, "a line too many"
        return [json.loads(text) for text in self.texts()]

    def one(self) -> dict[str, Any]:
        (line,) = self.all(1)
        return line


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    with caplog.at_level(logging.INFO, "server.access"):
        yield Lines(caplog)


def test_a_line_says_who_asked_what_and_how_it_ended(locked: Live, lines: Lines) -> None:
    before = time.time()
    exchange(locked.url, [head("GET", "/v1/models?secret=1", AUTH, ("X-Request-Id", "mine"))])
    line = lines.one()
    assert list(line) == FIELDS
    assert before - 0.01 < datetime.fromisoformat(line.pop("time")).timestamp() < before + 5
    assert 0 <= line.pop("duration_ms") < 5000
    assert line.pop("client").startswith("127.0.0.1:")
    assert line == {
        "request_id": "mine",
        "method": "GET",
        "path": "/v1/models",
        "status": 200,
        "key_id": ApiKey.of(KEY).id,
        "end": "finished",
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_of_what_generates_it_has_the_tokens(locked: Live, lines: Lines, path: str, stream: bool) -> None:
    body = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "stream": stream, "n": 2}
    answer = exchange(locked.url, [post(path, json.dumps(body).encode(), AUTH)])
    line = lines.one()
    assert list(line) == FIELDS + TOKENS
    assert (line["status"], line["end"], line["completion_tokens"]) == (200, "finished", 6)
    if not stream:
        assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]


def test_refusals_are_written_down_too(locked: Live, lines: Lines) -> None:
    good = b'{"prompt": "Hi"}'
    for request in (
        head("GET", "/v1/models"),
        head("GET", "/nothing", AUTH),
        post("/v1/completions", b"{", AUTH),
        head("POST", "/v1/completions", AUTH, ("Content-Length", str(len(good)))) + good,
        head("POST", "/v1/completions", AUTH, JSON, ("Content-Length", "99999999")),
    ):
        exchange(locked.url, [request])
    assert [(line["status"], line["key_id"] is None) for line in lines.all(5)] == [
        (401, True), (404, False), (400, False), (415, False), (413, False)
    ]  # fmt: skip


def test_what_the_parser_refuses_is_written_down_too(locked: Live, lines: Lines) -> None:
    answers = [
        exchange(locked.url, [head("GET", "/health", ("X-Large", "x" * 40_000))]),
        exchange(locked.url, [b"!!\n"]),
    ]
    found = lines.all(2)
    assert [line["status"] for line in found] == [431, 400]
    assert [line["request_id"] for line in found] == [answer.headers["x-request-id"] for answer in answers]
    assert all(list(line) == FIELDS for line in found)
    assert {(line["method"], line["path"], line["key_id"]) for line in found} == {(None, None, None)}
    assert all(0 <= line["duration_ms"] < 5000 for line in found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(tokenizer: Tokenizer, lines: Lines, stream: bool) -> None:
    with live_server(lambda: FakeEngine(lambda _: [5] * 1000, step_seconds=0.02), tokenizer) as live:
        body = json.dumps({"prompt": "Hi", "max_tokens": 200, "stream": stream}).encode()
        with connection(live.url) as sock:
            sock.sendall(post("/v1/completions", body))
            while live.call(lambda: live.engine.stats.generation_tokens) < 3:
                time.sleep(0.01)
        line = lines.one()
        assert (line["end"], line["status"]) == ("client_left", 200 if stream else 499)
        assert 3 <= line["completion_tokens"] < 200
        with connection(live.url) as sock:
            sock.sendall(post("/v1/completions", body)[:-5])
            time.sleep(0.1)
        line = lines.all(2)[1]
        assert (line["end"], line["status"]) == ("client_left", None)


BAD_IDS = [
    b"a\rINJECTED",
    b"a\tINJECTED",
    b"INJECTED" * 128,
    b'"INJECTED',
    b"\x1b[31mINJECTED",
    b"a\xe2\x80\xa8INJECTED",
]


@pytest.mark.parametrize("given", BAD_IDS)
def test_a_bad_request_id_does_not_reach_the_log(locked: Live, lines: Lines, given: bytes) -> None:
    exchange(locked.url, [head("GET", "/health", ("X-Request-Id", given))])
    assert lines.one()["request_id"].startswith("req_")
    assert "INJECTED" not in lines.texts()[0]


@pytest.mark.parametrize(
    "target", ["/a%0aINJECTED", "/a%0d%0aX", "/%00%1b%5b31m", "/%E2%80%A8%C2%85", "/%ff%22%7d", "/é"]
)
def test_a_line_stays_one(locked: Live, lines: Lines, target: str) -> None:
    exchange(locked.url, [head("GET", target)])
    lines.one()
    (text,) = lines.texts()
    assert len(text.splitlines()) == 1
    assert text.isascii()
    assert text.isprintable()


def test_a_long_path_is_cut(locked: Live, lines: Lines) -> None:
    exchange(locked.url, [head("GET", "/" + "x" * 10_000)])
    assert lines.one()["path"] == "/" + "x" * 199


def test_no_prompt_query_header_or_key(locked: Live, caplog: pytest.LogCaptureFixture) -> None:
    secret = "what-nobody-should-read"
    with caplog.at_level(logging.INFO):
        for body in ({"prompt": secret}, {"prompt": secret, "temperature": secret}, {"prompt": "Hi", secret: secret}):
            headers = (AUTH, ("Cookie", secret), ("User-Agent", secret))
            exchange(locked.url, [post(f"/v1/completions?a={secret}", json.dumps(body).encode(), *headers)])
        assert [line["status"] for line in Lines(caplog).all(3)] == [200, 400, 200]
    assert secret not in caplog.text
    assert KEY not in caplog.text


def test_an_answer_that_breaks_off(lines: Lines) -> None:
    async def breaks(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(RequestIds(AccessLog(breaks)))
    line = lines.one()
    assert (line["status"], line["end"]) == (200, "aborted")


def test_it_is_written_once_at_the_end(lines: Lines) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            assert lines.texts() == []
            message: Message = {"type": "http.response.body", "body": b"x", "more_body": more}
            await send(message)
        assert lines.texts() == []

    call(RequestIds(AccessLog(app)))
    assert lines.one()["end"] == "finished"


def test_logs_to_a_stream(locked: Live) -> None:
    stream = io.StringIO()
    with logs_to(stream):
        for _ in range(3):
            assert locked.client.get("/health").status_code == 200
        deadline = time.monotonic() + 5
        while stream.getvalue().count("\n") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    locked.client.get("/health")
    assert [json.loads(line)["path"] for line in stream.getvalue().splitlines()] == ["/health"] * 3
    log = logging.getLogger("server.access")
    assert (log.handlers, log.level, log.propagate) == ([], logging.NOTSET, True)


def test_other_records_go_the_same_way() -> None:
    stream = io.StringIO()
    before = logging.getLogger().handlers[:]
    with logs_to(stream):
        logging.getLogger("other").error("said %s", "this")
    assert stream.getvalue().endswith(" ERROR other: said this\n")
    assert logging.getLogger().handlers == before


def test_pipelined_requests_have_a_line_each(locked: Live, lines: Lines) -> None:
    with connection(locked.url) as sock:
        sock.sendall(head("GET", "/health") + head("GET", "/version"))
        read_answer(sock)
    assert "/health" in {line["path"] for line in lines.all(2)}
