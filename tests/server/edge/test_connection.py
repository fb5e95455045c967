"""Limits of a connection: how large a head may be, how long it may take, and how long an answer may go unread."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.e2e.raw import JSON, RawAnswer, connection, exchange, head, post, read_answer
from tests.server.edge.conftest import KEY, metric
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, live_server

MAX = 4000
HEAD_SECONDS = 0.5
READ_SECONDS = 0.7
GOOD = b'{"prompt": "Hi", "max_tokens": 1}'
CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    """An engine without end, as fast as it can."""
    edge = EdgeConfig(max_header_bytes=MAX, header_seconds=HEAD_SECONDS, read_seconds=READ_SECONDS)
    config = ServerConfig(served_model_name=MODEL, edge=edge)

    def engine() -> FakeEngine:
        return FakeEngine(lambda _: [5] * 100_000, info=fake_info(max_model_len=50_000, num_blocks=100_000))

    with live_server(engine, tokenizer, config) as live:
        yield live


def refusal(answer: RawAnswer, status: int) -> str:
    """The message of a refusal that ends the connection."""
    assert answer.status_code == status
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    message: str = error["message"]
    return message


def read_all(sock: socket.socket) -> bytes:
    """What there is until the connection ends, in whatever way. Fails after the socket's timeout."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(100_000):
            found += part
    return found


def statuses(sock: socket.socket, count: int) -> list[int]:
    """Of the next `count` answers, which may come together."""
    found: list[bytes] = []
    content = b""
    while len(found) < count:
        part = sock.recv(100_000)
        assert part, content
        content += part
        found = re.findall(rb"HTTP/1\.1 (\d{3}) ", content)
    return [int(status) for status in found]


def wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


# How large.


LARGE = {
    "a value": head("GET", "/health", ("X-Large", "x" * MAX)),
    "a value of 1 MB": head("GET", "/health", ("X-Large", "x" * 2**20)),
    "a name": head("GET", "/health", ("X" * MAX, "x")),
    "a target": head("GET", "/health?" + "x" * MAX),
    "many": head("GET", "/health", *[(f"X-{number}", "x" * 10) for number in range(250)]),
    "many empty ones": head("GET", "/health", *[(f"X-{number}", "") for number in range(1000)]),
    "of a POST": post("/v1/completions", GOOD, ("X-Large", "x" * MAX)),
    "trailers": head("POST", "/v1/completions", JSON, CHUNKED) + b"0\r\n" + b"X-Trailer: x\r\n" * 500 + b"\r\n",
    "a trailer": head("POST", "/v1/completions", JSON, CHUNKED) + b"1\r\nx\r\n0\r\nX-Trailer: " + b"x" * 2**20,
    "an extension of a chunk": head("POST", "/v1/completions", JSON, CHUNKED) + b"1;" + b"x" * 2**20,
}


@pytest.mark.parametrize("size", [100, 5000, 2**21], ids=lambda size: f"in pieces of {size}")
@pytest.mark.parametrize("request_bytes", LARGE.values(), ids=LARGE.keys())
def test_a_head_that_is_too_large(live: Live, request_bytes: bytes, size: int) -> None:
    pieces = [request_bytes[start : start + size] for start in range(0, min(len(request_bytes), 300 * size), size)]
    assert f"{MAX} bytes" in refusal(exchange(live.url, pieces), 431)


def test_a_head_at_the_limit(live: Live) -> None:
    for headers in ([("X-Large", "x" * (MAX - 100))], [(f"X-{number:03}", "x" * 20) for number in range(134)]):
        request = head("GET", "/health", *headers)
        assert MAX - 300 < len(request) < MAX
        for size in (7, len(request)):
            pieces = [request[start : start + size] for start in range(0, len(request), size)]
            assert exchange(live.url, pieces).status_code == 200


def test_each_head_of_a_connection_counts_for_itself(live: Live) -> None:
    """Also behind a large body, in the same packets."""
    body = b'{"prompt": "Hi", "max_tokens": 1, "user": "' + b"x" * 200_000 + b'"}'
    with connection(live.url) as sock:
        for _ in range(3):
            requests = post("/v1/completions", body, ("X-Large", "x" * (MAX - 300)))
            half = head("GET", "/health", ("X-Large", "x" * (MAX - 300)))
            sock.sendall(requests + half[:-1])
            assert read_answer(sock).status_code == 200
            sock.sendall(half[-1:])
            assert read_answer(sock).status_code == 200


def test_a_client_that_still_sends_gets_the_answer(live: Live) -> None:
    """10 MB of headers, which it has to get rid of before it reads."""
    start = time.monotonic()
    with connection(live.url) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(1000):
            sock.sendall(b"X-Large: " + b"x" * 10_000 + b"\r\n")
        refusal(read_answer(sock), 431)
        read_all(sock)
    assert time.monotonic() - start < 10


def test_a_trailer_is_no_header(tokenizer: Tokenizer) -> None:
    """A proxy in front has not looked at it."""
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(api_keys=(ApiKey.of(KEY),)))
    trailers = b"0\r\nAuthorization: Bearer " + KEY.encode() + b"\r\nX-Request-Id: mine\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(GOOD), GOOD)
    with live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live:
        answer = exchange(live.url, [head("POST", "/v1/completions", JSON, CHUNKED) + chunk + trailers])
        assert answer.status_code == 401
        assert answer.headers["x-request-id"] != "mine"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        head("POST", "/v1/completions", JSON, ("Content-Length", "2"), ("Content-Length", "3")),
        head("POST", "/v1/completions", JSON, CHUNKED) + b"zz\r\n",
    ],
    ids=lambda request: repr(request[:20]),
)
def test_what_is_no_http(live: Live, request_bytes: bytes) -> None:
    assert refusal(exchange(live.url, [request_bytes]), 400) == "This is not valid HTTP."


def test_an_id_that_was_read_already_is_kept(live: Live) -> None:
    answer = exchange(live.url, [head("GET", "/health", ("X-Request-Id", "mine"), ("X-Large", "x" * MAX))])
    assert answer.headers["x-request-id"] == "mine"


UPGRADES = {
    "h2c, as curl": [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk")],
    "websocket": [("Connection", "keep-alive, Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "eA==")],
    "twice": [("Connection", "upgrade"), ("Upgrade", "h2c"), ("Upgrade", "")],
}


def complete(*headers: tuple[str, str]) -> list[bytes]:
    """With its length, and in a chunk with a trailer that asks for an upgrade too late."""
    chunk = b"%x\r\n%s\r\n0\r\nUpgrade: h2c\r\n\r\n" % (len(GOOD), GOOD)
    sized = post("/v1/completions", GOOD, *headers)
    return [sized, head("POST", "/v1/completions", JSON, CHUNKED, *headers) + chunk]


@pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES.keys())
@pytest.mark.parametrize("size", [1, 7, 10_000], ids=lambda size: f"in pieces of {size}")
def test_an_upgrade_is_ignored(live: Live, headers: list[tuple[str, str]], size: int) -> None:
    """With a body or without, whatever of it comes with the head, and before or behind other requests."""
    requests = [head("GET", "/health", *headers), *complete(*headers), post("/v1/completions", GOOD)]
    sent = b"".join([*requests, *reversed(requests)])
    with connection(live.url) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), size):
            sock.sendall(sent[start : start + size])
        assert statuses(sock, 8) == [200] * 8


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_the_body_of_an_upgrade_comes_with_its_head_or_later(live: Live, gap: float) -> None:
    for request in complete(*UPGRADES["h2c, as curl"], ("X-Request-Id", "mine")):
        end = request.index(b"\r\n\r\n") + 4
        with connection(live.url) as sock:
            for part in (request[:end], request[end:]) if gap else (request,):
                sock.sendall(part)
                time.sleep(gap)
            answer = read_answer(sock)
            assert answer.status_code == 200, answer.content
            assert answer.headers["x-request-id"] == "mine"
            assert answer.json()["usage"]["completion_tokens"] == 1
            sock.sendall(head("GET", "/health"))
            assert read_answer(sock).status_code == 200


def test_the_limits_hold_for_an_upgrade(live: Live) -> None:
    headers = UPGRADES["h2c, as curl"]
    refusal(exchange(live.url, [head("GET", "/health", *headers, ("X-Large", "x" * MAX))]), 431)
    refusal(exchange(live.url, [post("/v1/completions", GOOD, ("Content-Length", "3"), *headers)]), 400)
    refusal(exchange(live.url, [head("CONNECT", "x:80", *headers)]), 400)


def test_refusals_are_counted(live: Live) -> None:
    series = 'requests_rejected_total{model_name="org/fake-model",reason="invalid_request"}'
    before = metric(live, series)
    for request, status in (
        (b"GARBAGE\r\n\r\n", 400),
        (head("GET", "/health", ("X-Large", "x" * MAX)), 431),
        (b"GET", 408),
    ):
        refusal(exchange(live.url, [request]), status)
    assert metric(live, series) == before + 3


# How long.


@pytest.mark.parametrize("part", [b"G", b"GET /health HTTP/1.1\r\n", head("GET", "/health")[:-1]])
def test_a_head_that_stalls(live: Live, part: bytes) -> None:
    with connection(live.url, seconds=5) as sock:
        start = time.monotonic()
        sock.sendall(part)
        assert "0.5 seconds" in refusal(read_answer(sock), 408)
        assert HEAD_SECONDS - 0.05 < time.monotonic() - start < HEAD_SECONDS + 2
        read_all(sock)
        assert time.monotonic() - start < HEAD_SECONDS + 4


def test_a_head_that_trickles_gains_no_time(live: Live) -> None:
    with connection(live.url, seconds=5) as sock:
        start = time.monotonic()
        sock.settimeout(0.05)
        answer = b""
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        while not answer and time.monotonic() - start < 5:
            sock.sendall(b"X-A: b\r\n")
            try:
                answer = sock.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start < HEAD_SECONDS + 2


@pytest.mark.parametrize("first", [b"", b"\r\n" * 100])
def test_a_connection_on_which_nothing_begins_is_closed(live: Live, first: bytes) -> None:
    with connection(live.url, seconds=5) as sock:
        sock.sendall(first)
        assert sock.recv(1) == b""


def test_a_slow_but_steady_head_is_served(live: Live) -> None:
    with connection(live.url) as sock:
        for part in (b"GET /hea", b"lth HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n"):
            sock.sendall(part)
            time.sleep(0.05)
        assert read_answer(sock).status_code == 200


def test_each_head_of_a_connection_has_its_own_time(live: Live) -> None:
    with connection(live.url) as sock:
        for _ in range(3):
            time.sleep(HEAD_SECONDS * 0.7)
            sock.sendall(head("GET", "/health"))
            assert read_answer(sock).status_code == 200
        sock.sendall(b"GET")
        refusal(read_answer(sock), 408)


def test_half_a_request_does_not_cost_the_one_before_its_answer(live: Live) -> None:
    live.call(lambda: setattr(live.engine, "step_seconds", 0.05))
    try:
        with connection(live.url) as sock:
            body = {"prompt": "Hi", "max_tokens": 30, "ignore_eos": True}
            sock.sendall(post("/v1/completions", json.dumps(body).encode()) + b"GET /health HTTP/1.1\r\n")
            start = time.monotonic()
            answer = read_answer(sock)
            assert time.monotonic() - start > 2 * HEAD_SECONDS
            assert answer.json()["usage"]["completion_tokens"] == 30
            refusal(read_answer(sock), 408)
    finally:
        live.call(lambda: setattr(live.engine, "step_seconds", 0.0))


def test_a_body_that_nobody_waits_for_holds_no_connection(tokenizer: Tokenizer) -> None:
    """A refused client that goes on with its body, one byte at a time."""
    edge = EdgeConfig(api_keys=(ApiKey.of(KEY),), header_seconds=HEAD_SECONDS)
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    with (
        live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live,
        connection(live.url) as sock,
    ):
        sock.sendall(head("POST", "/v1/completions", JSON, ("Content-Length", "1000000")))
        assert read_answer(sock).status_code == 401
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 5:
                sock.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 4


# How long unread.


def reader(
    live: Live, body: Mapping[str, object], *, buffer: int = 4096, headers: Sequence[tuple[str, str]] = ()
) -> socket.socket:
    """A client with a small buffer that has sent its request and reads nothing."""
    host, port = live.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(10)
    sock.connect((host, int(port)))
    sock.sendall(post("/v1/completions", json.dumps({"prompt": "Hi", "ignore_eos": True, **body}).encode(), *headers))
    return sock


def connections(live: Live) -> set[int]:
    return live.call(lambda: {id(one) for one in live.http.server_state.connections})


LARGE_ANSWER = {"prompt": [5] * 40_000, "echo": True, "logprobs": 20, "max_tokens": 0}
STREAM = {"stream": True, "logprobs": 20, "n": 4, "max_tokens": 40_000}


def test_a_client_that_stops_reading_its_stream_is_cut(live: Live) -> None:
    before = connections(live)
    start = time.monotonic()
    with reader(live, STREAM) as sock:
        wait(lambda: live.call(lambda: live.service.num_inflight) == 1)
        wait(lambda: live.call(lambda: live.service.num_inflight) == 0)
        assert READ_SECONDS < time.monotonic() - start < READ_SECONDS + 3
        stats = live.call(lambda: live.engine.stats)
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_blocks == stats.num_blocks
        wait(lambda: connections(live) <= before)
        assert not read_all(sock).endswith(b"0\r\n\r\n"), "the stream was cut"
    assert live.complete(max_tokens=1)["usage"]["completion_tokens"] == 1


def test_others_do_not_notice(live: Live) -> None:
    alone = live.complete(max_tokens=50)["choices"]
    with reader(live, STREAM):
        wait(lambda: live.call(lambda: live.service.num_inflight) == 1)
        for _ in range(3):
            assert live.complete(max_tokens=50)["choices"] == alone
    wait(lambda: live.call(lambda: live.service.num_inflight) == 0)


def test_a_client_that_reads_with_pauses_is_not_cut(live: Live) -> None:
    end = time.monotonic() + 3 * READ_SECONDS
    with reader(live, STREAM, buffer=2**16) as sock:
        while time.monotonic() < end:
            for _ in range(100):
                assert sock.recv(2**16)
            time.sleep(READ_SECONDS / 7)
        assert live.call(lambda: live.service.num_inflight) == 1
    wait(lambda: live.call(lambda: live.service.num_inflight) == 0)


def test_a_slow_reader_of_a_large_answer_is_not_cut(live: Live) -> None:
    """What waits for it never falls under the mark at which a paused writer resumes, but it falls."""
    end = time.monotonic() + 3 * READ_SECONDS
    with reader(live, LARGE_ANSWER, buffer=2**16) as sock:
        while time.monotonic() < end:
            assert sock.recv(2**12)
            time.sleep(READ_SECONDS / 20)
        assert live.call(lambda: [one.transport.get_write_buffer_size() for one in live.http.server_state.connections])


def test_a_client_that_reads_late_but_all_keeps_its_connection(live: Live) -> None:
    with reader(live, LARGE_ANSWER, buffer=2**16) as sock:
        time.sleep(READ_SECONDS / 2)
        answer = read_answer(sock)
        assert len(answer.content) > 10**7
        time.sleep(READ_SECONDS)
        sock.sendall(head("GET", "/health"))
        assert read_answer(sock).status_code == 200


def test_a_whole_answer_that_nobody_reads_is_let_go(live: Live) -> None:
    """Its request has ended long ago: what is left is a connection with a full buffer."""
    before = connections(live)
    with reader(live, LARGE_ANSWER) as sock:
        wait(lambda: live.call(lambda: live.service.num_inflight) == 1)
        wait(lambda: live.call(lambda: live.service.num_inflight) == 0)
        wait(lambda: connections(live) <= before)
        answer = read_all(sock)
        assert b"200 OK" in answer
        assert not answer.endswith(b"}"), "the answer was cut"


def test_an_answer_that_nearly_fits_the_buffers_is_let_go_too(tokenizer: Tokenizer) -> None:
    """Too short for the transport to complain, too long for the system's buffers: closing alone would wait for ever."""
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(read_seconds=READ_SECONDS))
    with live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live:
        (listener,) = live.http.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {"prompt": [5] * 150, "echo": True, "logprobs": 20, "max_tokens": 0}
        with reader(live, body, headers=[("Connection", "close")]) as sock:
            wait(lambda: len(connections(live)) == 1)
            wait(lambda: len(connections(live)) == 0)
            answer = read_all(sock)
            assert b"200 OK" in answer
            assert not answer.endswith(b"}"), "the answer was cut"
