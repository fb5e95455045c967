"""What goes wrong on the wire (rows H3 and H4), beside four good streams that do not change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.bad_cases import CHAT, COMPLETIONS, DETOKENIZE, GOOD, MODEL, TOKENIZE
from tests.e2e.error_answers import check_error, check_parser_error
from tests.e2e.good_streams import GoodStreams, unharmed
from tests.e2e.raw import JSON, chunked, connection, exchange, head, post, read_answer
from tests.e2e.running import Server, running_server

LIMIT = 2 * 2**20
FLAT = 16 * 2**20
"""Bytes that the server may grow by: a few bodies' worth."""
TE = ("Transfer-Encoding", "chunked")


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    options = ("--served-model-name", MODEL, "--dtype", "float32")
    with running_server(str(tiny_checkpoint), *options) as server:
        yield server


@pytest.fixture(scope="module")
def streams(server: Server) -> Iterator[GoodStreams]:
    with unharmed(server, MODEL) as streams:
        yield streams


@pytest.fixture(autouse=True)
def _nobody_notices(server: Server, streams: GoodStreams) -> Iterator[None]:
    yield
    streams.check()
    assert httpx.get(f"{server.url}/health").status_code == 200


@contextlib.contextmanager
def memory_stays_flat(server: Server) -> Iterator[None]:
    """The server's resident memory, looked at every few milliseconds, grows by at most FLAT."""
    process = psutil.Process(server.process.pid)
    before = peak = process.memory_info().rss
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join()
    assert peak - before <= FLAT, f"grew by {(peak - before) / 2**20:.0f} MiB"


# H3


def long_body(size: int) -> bytes:
    """A request of `size` bytes, nearly all of them in a field without effect."""
    body = GOOD[:-1] + b', "user": ""}'
    return body[:-2] + b"x" * (size - len(body)) + body[-2:]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE])
@pytest.mark.parametrize("size", [LIMIT + 1, 100 * 2**20])
def test_a_sized_body_over_the_limit(server: Server, path: str, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield head("POST", path, JSON, ("Content-Length", str(size)))
        for _ in range(0, size, 2**16):
            yield b"x" * 2**16

    with memory_stays_flat(server):
        error = check_error(exchange(server.url, pieces()), 413, param=None, code=None)
    assert str(LIMIT) in error["message"]


@pytest.mark.parametrize("length", ["9" * 15, "18446744073709551615"])
def test_a_length_beyond_all_measure(server: Server, length: str) -> None:
    """Refused by the header alone: nothing of the body comes."""
    answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, ("Content-Length", length))])
    check_error(answer, 413, param=None, code=None)


@pytest.mark.parametrize("chunk", [1, 17, 10_000, 2**20])
def test_a_chunked_body_over_the_limit(server: Server, chunk: int) -> None:
    with memory_stays_flat(server):
        body = chunked(long_body(LIMIT + 1), chunk)
        answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, TE), *body])
        check_error(answer, 413, param=None, code=None)


def test_a_chunked_body_without_end(server: Server) -> None:
    """The answer comes although the body goes on, or the connection is closed."""
    with memory_stays_flat(server), connection(server.url) as sock:
        sock.sendall(head("POST", COMPLETIONS, JSON, TE))
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16))
        check_error(read_answer(sock), 413, param=None, code=None)


def test_a_million_chunks_of_one_byte(server: Server) -> None:
    """Under the limit, so that all of them are read."""
    body = long_body(1_000_000)
    with memory_stays_flat(server):
        answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, TE), *chunked(body, 1)])
    assert answer.status_code == 200, answer.content


def test_a_body_at_the_limit(server: Server) -> None:
    assert exchange(server.url, [post(COMPLETIONS, long_body(LIMIT))]).status_code == 200


# H4


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonl", "json"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE])
def test_a_wrong_content_type(server: Server, path: str, kind: str) -> None:
    headers = {"Content-Type": kind}
    response = httpx.post(f"{server.url}{path}", content=GOOD, headers=headers)
    check_error(response, 415, param=None, code=None)


def test_no_content_type(server: Server) -> None:
    answer = exchange(server.url, [head("POST", COMPLETIONS, ("Content-Length", str(len(GOOD)))) + GOOD])
    check_error(answer, 415, param=None, code=None)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
def test_a_right_content_type(server: Server, kind: str) -> None:
    response = httpx.post(f"{server.url}{COMPLETIONS}", content=GOOD, headers={"Content-Type": kind})
    assert response.status_code == 200


LARGE_HEADERS = {
    "one of 33 KB": [("X-Large", "x" * 33_000)],
    "one of 10 MB": [("X-Large", "x" * 10_000_000)],
    "a name of 33 KB": [("X" * 33_000, "x")],
    "400 of 100 bytes": [(f"X-{number}", "x" * 100) for number in range(400)],
    "20,000 empty ones": [(f"X-{number}", "") for number in range(20_000)],
}


@pytest.mark.parametrize("headers", LARGE_HEADERS.values(), ids=LARGE_HEADERS.keys())
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_headers_over_32_kib(server: Server, method: str, headers: list[tuple[str, str]]) -> None:
    request = head("GET", "/v1/models", *headers) if method == "GET" else post(COMPLETIONS, GOOD, *headers)
    with memory_stays_flat(server):
        pieces = [request[start : start + 5000] for start in range(0, len(request), 5000)]
        check_parser_error(exchange(server.url, pieces))


def test_a_target_over_32_kib(server: Server) -> None:
    check_parser_error(exchange(server.url, [head("GET", "/v1/models?" + "x" * 33_000)]))


def test_headers_without_end(server: Server) -> None:
    """Nothing is kept of headers that go on and on, and the connection is not."""

    def pieces() -> Iterator[bytes]:
        yield head("GET", "/v1/models")[:-2]
        for number in range(3000):
            yield f"X-{number}: {'x' * 5000}\r\n".encode()

    with memory_stays_flat(server):
        check_parser_error(exchange(server.url, pieces()))


def test_headers_of_30_kb_are_read(server: Server) -> None:
    for headers in ([("X-Large", "x" * 30_000)], [(f"X-{number}", "x" * 100) for number in range(250)]):
        assert exchange(server.url, [head("GET", "/v1/models", *headers)]).status_code == 200


MALFORMED = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "no such method": head("BREW", COMPLETIONS),
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the target": b"GET /v1/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
    "a negative length": head("POST", COMPLETIONS, JSON, ("Content-Length", "-5")),
    "a length in words": head("POST", COMPLETIONS, JSON, ("Content-Length", "five")),
    "a length that overflows": head("POST", COMPLETIONS, JSON, ("Content-Length", "9" * 40)),
    "two lengths": head("POST", COMPLETIONS, JSON, ("Content-Length", "2"), ("Content-Length", "3")) + b"{}",
    "length and chunks": head("POST", COMPLETIONS, JSON, ("Content-Length", "2"), TE) + b"2\r\n{}\r\n0\r\n\r\n",
    "no such encoding": head("POST", COMPLETIONS, JSON, ("Transfer-Encoding", "gzip")),
    "a chunk of no size": head("POST", COMPLETIONS, JSON, TE) + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk of 2^64 bytes": head("POST", COMPLETIONS, JSON, TE) + b"1" + b"0" * 16 + b"\r\n{}\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http(server: Server, request_bytes: bytes) -> None:
    check_parser_error(exchange(server.url, [request_bytes]))


def test_a_client_that_leaves_in_the_middle_of_a_request(server: Server) -> None:
    """Wherever it breaks off."""
    request = post(COMPLETIONS, GOOD)
    for length in range(0, len(request), 7):
        with connection(server.url) as sock:
            sock.sendall(request[:length])


def test_requests_one_after_the_other_on_one_connection(server: Server) -> None:
    """A refusal does not take the next request's answer away, nor part of its bytes."""
    with connection(server.url) as sock:
        for body in (b"{", GOOD, b'{"prompt": 5}', GOOD):
            sock.sendall(post(COMPLETIONS, body))
            assert read_answer(sock).status_code == (200 if body is GOOD else 400)
