"""What goes wrong on the wire (rows H3, H4, H5 and H17), beside four good streams that do not change."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.bad_cases import CHAT, COMPLETIONS, MODEL
from tests.e2e.error_answers import check_error
from tests.e2e.good_streams import GoodStreams, unharmed
from tests.e2e.raw import JSON, RawAnswer, chunked, connection, exchange, head, post, read_answer
from tests.e2e.running import Server, running_server

KEY, OTHER_KEY = "sk-first-0123456789", "sk-second-0123456789"
BEARER = ("Authorization", f"Bearer {KEY}")
LIMIT = 2 * 2**20
FLAT = 16 * 2**20
"""Bytes that the server may grow by: a few bodies' worth."""
TE = ("Transfer-Encoding", "chunked")
OPEN = {"/", "/health", "/ready", "/version", "/docs", "/openapi.json"}
GOOD = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 3}).encode()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    options = ("--served-model-name", MODEL, "--dtype", "float32", "--api-key", OTHER_KEY, "--api-key", KEY)
    with running_server(str(tiny_checkpoint), *options) as server:
        yield server


@pytest.fixture(scope="module")
def streams(server: Server) -> Iterator[GoodStreams]:
    with unharmed(server, MODEL, key=KEY) as streams:
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


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
@pytest.mark.parametrize("size", [LIMIT + 1, 100 * 2**20])
def test_a_sized_body_over_the_limit(server: Server, path: str, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield head("POST", path, JSON, BEARER, ("Content-Length", str(size)))
        for _ in range(0, size, 2**16):
            yield b"x" * 2**16

    with memory_stays_flat(server):
        error = check_error(exchange(server.url, pieces()), 413, param=None, code=None)
    assert str(LIMIT) in error["message"]


@pytest.mark.parametrize("length", ["9" * 15, "18446744073709551615"])
def test_a_length_beyond_all_measure(server: Server, length: str) -> None:
    """Refused by the header alone: nothing of the body comes."""
    answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", length))])
    check_error(answer, 413, param=None, code=None)


@pytest.mark.parametrize("chunk", [1, 17, 10_000, 2**20])
def test_a_chunked_body_over_the_limit(server: Server, chunk: int) -> None:
    with memory_stays_flat(server):
        body = chunked(long_body(LIMIT + 1), chunk)
        answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, BEARER, TE), *body])
        check_error(answer, 413, param=None, code=None)


def test_a_chunked_body_without_end(server: Server) -> None:
    """The answer comes although the body goes on, or the connection is closed."""
    with memory_stays_flat(server), connection(server.url) as sock:
        sock.sendall(head("POST", COMPLETIONS, JSON, BEARER, TE))
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16))
        check_error(read_answer(sock), 413, param=None, code=None)


def test_a_million_chunks_of_one_byte(server: Server) -> None:
    """Under the limit, so that all of them are read."""
    body = long_body(1_000_000)
    with memory_stays_flat(server):
        answer = exchange(server.url, [head("POST", COMPLETIONS, JSON, BEARER, TE), *chunked(body, 1)])
    assert answer.status_code == 200, answer.content


def test_a_body_at_the_limit(server: Server) -> None:
    assert exchange(server.url, [post(COMPLETIONS, long_body(LIMIT), BEARER)]).status_code == 200


# H4


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonl", "json"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_wrong_content_type(server: Server, path: str, kind: str) -> None:
    headers = dict([BEARER]) | {"Content-Type": kind}
    response = httpx.post(f"{server.url}{path}", content=GOOD, headers=headers)
    check_error(response, 415, param=None, code=None)


def test_no_content_type(server: Server) -> None:
    answer = exchange(server.url, [head("POST", COMPLETIONS, BEARER, ("Content-Length", str(len(GOOD)))) + GOOD])
    check_error(answer, 415, param=None, code=None)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
def test_a_right_content_type(server: Server, kind: str) -> None:
    response = httpx.post(f"{server.url}{COMPLETIONS}", content=GOOD, headers=dict([BEARER]) | {"Content-Type": kind})
    assert response.status_code == 200


def refused_by_the_parser(answer: RawAnswer) -> None:
    """A 400 or 431, in plain text or in the error shape."""
    assert answer.status_code in (400, 431), answer.status_code
    if answer.headers.get("content-type") == "application/json":
        check_error(answer, answer.status_code, param=None, code=None)
    assert len(answer.content) < 1000


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
    request = (
        head("GET", "/v1/models", BEARER, *headers) if method == "GET" else post(COMPLETIONS, GOOD, BEARER, *headers)
    )
    with memory_stays_flat(server):
        pieces = [request[start : start + 5000] for start in range(0, len(request), 5000)]
        refused_by_the_parser(exchange(server.url, pieces))


def test_a_target_over_32_kib(server: Server) -> None:
    refused_by_the_parser(exchange(server.url, [head("GET", "/v1/models?" + "x" * 33_000, BEARER)]))


def test_headers_without_end(server: Server) -> None:
    """Nothing is kept of headers that go on and on, and the connection is not."""

    def pieces() -> Iterator[bytes]:
        yield head("GET", "/v1/models", BEARER)[:-2]
        for number in range(3000):
            yield f"X-{number}: {'x' * 5000}\r\n".encode()

    with memory_stays_flat(server):
        refused_by_the_parser(exchange(server.url, pieces()))


def test_headers_of_30_kb_are_read(server: Server) -> None:
    for headers in ([("X-Large", "x" * 30_000)], [(f"X-{number}", "x" * 100) for number in range(250)]):
        assert exchange(server.url, [head("GET", "/v1/models", BEARER, *headers)]).status_code == 200


MALFORMED = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "no such method": head("BREW", COMPLETIONS),
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the target": b"GET /v1/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
    "a negative length": head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", "-5")),
    "a length in words": head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", "five")),
    "a length that overflows": head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", "9" * 40)),
    "two lengths": head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", "2"), ("Content-Length", "3")) + b"{}",
    "length and chunks": head("POST", COMPLETIONS, JSON, BEARER, ("Content-Length", "2"), TE) + b"2\r\n{}\r\n0\r\n\r\n",
    "no such encoding": head("POST", COMPLETIONS, JSON, BEARER, ("Transfer-Encoding", "gzip")),
    "a chunk of no size": head("POST", COMPLETIONS, JSON, BEARER, TE) + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk of 2^64 bytes": head("POST", COMPLETIONS, JSON, BEARER, TE) + b"1" + b"0" * 16 + b"\r\n{}\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http(server: Server, request_bytes: bytes) -> None:
    refused_by_the_parser(exchange(server.url, [request_bytes]))


def test_a_client_that_leaves_in_the_middle_of_a_request(server: Server) -> None:
    """Wherever it breaks off."""
    request = post(COMPLETIONS, GOOD, BEARER)
    for length in range(0, len(request), 7):
        with connection(server.url) as sock:
            sock.sendall(request[:length])


def test_requests_one_after_the_other_on_one_connection(server: Server) -> None:
    """A refusal does not take the next request's answer away, nor part of its bytes."""
    with connection(server.url) as sock:
        for body in (b"{", GOOD, b'{"prompt": 5}', GOOD):
            sock.sendall(post(COMPLETIONS, body, BEARER))
            assert read_answer(sock).status_code == (200 if body is GOOD else 400)


# H5


def authorized(*values: str | bytes) -> list[tuple[str, str | bytes]]:
    return [("Authorization", value) for value in values]


WRONG_KEYS: dict[str, list[tuple[str, str | bytes]]] = {
    "none": [],
    "another": authorized("Bearer sk-other"),
    "the beginning of one": authorized(f"Bearer {KEY[:-1]}"),
    "one and more": authorized(f"Bearer {KEY}x"),
    "in capitals": authorized(f"Bearer {KEY.upper()}"),
    "both": authorized(f"Bearer {KEY} {OTHER_KEY}"),
    "both, with a comma": authorized(f"Bearer {KEY},{OTHER_KEY}"),
    "empty": authorized("Bearer "),
    "no scheme": authorized(KEY),
    "another scheme": authorized(f"Basic {KEY}"),
    "nothing": authorized(""),
    "not ASCII": authorized(f"Bearer {KEY}é".encode()),
    "not UTF-8": authorized(b"Bearer \xff\xfe"),
    "1 KB": authorized("Bearer " + "x" * 1000),
    "in another header": [("X-Api-Key", KEY)],
    "in a cookie": [("Cookie", f"Authorization=Bearer {KEY}")],
}


@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/models", "/metrics", "/tokenize", "/v1/experts"])
def test_no_or_a_wrong_key(server: Server, path: str, headers: list[tuple[str, str | bytes]]) -> None:
    get = path in ("/v1/models", "/metrics", "/v1/experts")
    request = head("GET", path, *headers) if get else post(path, GOOD, *headers)
    error = check_error(exchange(server.url, [request]), 401, param=None, code="invalid_api_key")
    assert KEY not in error["message"]


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_key_opens(server: Server, key: str) -> None:
    for scheme in ("Bearer", "bearer"):
        request = post(COMPLETIONS, GOOD, ("Authorization", f"{scheme} {key}"))
        assert exchange(server.url, [request]).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        head("GET", "/v1/models", ("Host", "x/health?")),
        head("GET", "/v1/models", ("Host", "127.0.0.1/docs#")),
        head("GET", "//v1/models"),
        head("GET", "/health/../v1/models"),
        head("GET", "/health/%2e%2e/v1/models"),
        head("GET", "/docs%2f..%2fv1/models"),
        head("GET", "/v1/models?/health"),
        head("GET", "/v1/models#/health"),
        head("GET", "/v1/models;/health"),
        head("GET", "http://x/v1/models"),
        head("GET", "/V1/models"),
        head("GET", "/v1/models/"),
        head("OPTIONS", "/v1/models"),
        head("OPTIONS", "*"),
        post("//v1/completions", GOOD),
        post("/v1/completions", GOOD, ("X-Original-URL", "/health")),
        post("/v1/completions", GOOD, ("X-Forwarded-Prefix", "/health")),
        head("GET", "/v1/nothing"),
        head("GET", "/docs/nothing"),
        head("POST", "/v1/experts/reset", ("Content-Length", "0")),
    ],
    ids=lambda request: request.split(b" HTTP")[0].decode() + " " + request.split(b"\r\n")[1].decode()[-20:],
)
def test_no_way_around_the_key(server: Server, request_bytes: bytes) -> None:
    answer = exchange(server.url, [request_bytes])
    assert answer.status_code in (400, 401, 404), answer.status_code
    check_error(answer, answer.status_code, param=None, code=answer.json()["error"]["code"])


def test_every_route_is_closed_but_the_open_ones(server: Server) -> None:
    """As the schema lists them: a new one is closed unless somebody opens it here too."""
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert len(paths) > 8
    for path, methods in paths.items():
        for method in methods:
            answer = exchange(server.url, [head(method.upper(), path, ("Content-Length", "0"))])
            assert (answer.status_code == 401) == (path not in OPEN), f"{method} {path}: {answer.status_code}"


def test_a_key_is_asked_for_before_a_body_is_read(server: Server) -> None:
    """Else whoever has none could make the server read, wait and parse."""
    with connection(server.url) as sock:
        sock.sendall(head("POST", COMPLETIONS, JSON, ("Content-Length", "1000")))
        check_error(read_answer(sock), 401, param=None, code="invalid_api_key")


# H17


MARK = "INJECTED"
BAD_IDS: dict[str, bytes] = {
    "CR": f"a\r{MARK}".encode(),
    "LF": f"a\n{MARK}".encode(),
    "CR LF": f"a\r\n{MARK}".encode(),
    "CR LF, folded": f"a\r\n {MARK}".encode(),
    "NUL": f"a\0{MARK}".encode(),
    "1 KB": MARK.encode() * 128,
    "129 characters": b"x" * 120 + b"-" + MARK.encode(),
    "a space": f"a {MARK}".encode(),
    "a tab": f"a\t{MARK}".encode(),
    "escape": f"\x1b[31m{MARK}".encode(),
    "quotes": f'"{MARK}", "level": "x'.encode(),
    "U+0085": f"a\u0085{MARK}".encode(),
    "U+2028": f"a\u2028{MARK}".encode(),
    "Latin-1": b"\xe9" + MARK.encode(),
    "empty": b"",
}


def logged(server: Server, request_id: str) -> dict[str, Any]:
    """The one line of the access log about a request."""
    deadline = time.monotonic() + 5
    while request_id not in server.log_text():
        assert time.monotonic() < deadline, f"{request_id} is not logged"
        time.sleep(0.01)
    (line,) = [line for line in server.log_text().split("\n") if request_id in line]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("given", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_a_bad_request_id_is_replaced(server: Server, given: bytes) -> None:
    header = ("X-Request-Id", given)
    for request in (
        head("GET", "/v1/models", BEARER, header),
        post(COMPLETIONS, GOOD, BEARER, header),
        post("/x", b"", header),
    ):
        answer = exchange(server.url, [request])
        if answer.status_code == 400:
            refused_by_the_parser(answer)
        request_id = answer.headers["x-request-id"]
        assert re.fullmatch("req_[0-9a-f]{32}", request_id)
        assert logged(server, request_id)["status"] == answer.status_code
    assert MARK not in server.log_text()


def test_a_good_request_id_comes_back_and_is_logged(server: Server) -> None:
    for request_id in ("mine-1", "x" * 128):
        answer = exchange(server.url, [post(COMPLETIONS, GOOD, BEARER, ("X-Request-Id", request_id))])
        assert answer.headers["x-request-id"] == request_id
        assert logged(server, request_id)["status"] == 200


@pytest.mark.parametrize(
    "path", ["/v1/a%0aINJECTED", "/v1/a%0d%0aINJECTED", "/v1/%1b%5b31mINJECTED", "/%E2%80%A8INJECTED"]
)
def test_a_path_does_not_break_a_line_of_the_log(server: Server, path: str) -> None:
    answer = exchange(server.url, [head("GET", path, BEARER)])
    assert answer.status_code == 404
    assert MARK in logged(server, answer.headers["x-request-id"])["path"]
    assert not [line for line in server.log_text().splitlines() if line.startswith(MARK)]
    assert "\x1b" not in server.log_text()


def test_the_log_has_no_prompts_and_no_keys(server: Server) -> None:
    secret = "what-nobody-should-read"
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": secret}),
        (CHAT, {"messages": [{"role": "user", "content": secret}]}),
        (COMPLETIONS, {"prompt": secret, "temperature": secret}),
        (COMPLETIONS, {"prompt": "Hi", secret: secret}),
        (f"{COMPLETIONS}?key={secret}", {}),
    ]
    for path, body in bodies:
        response = httpx.post(f"{server.url}{path}", json=body, headers=dict([BEARER]))
        logged(server, response.headers["x-request-id"])
    for text in (secret, KEY, OTHER_KEY):
        assert text not in server.log_text()
