"""Keys and request ids (rows H5 and H17), beside four good streams that do not change."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.bad_cases import CHAT, COMPLETIONS, GOOD, MODEL, TOKENIZE
from tests.e2e.error_answers import check_error, check_parser_error
from tests.e2e.good_streams import GoodStreams, unharmed
from tests.e2e.raw import JSON, connection, exchange, head, post, read_answer
from tests.e2e.running import Server, running_server

KEY, OTHER_KEY = "sk-first-0123456789", "sk-second-0123456789"
BEARER = ("Authorization", f"Bearer {KEY}")
OPEN = {"/", "/health", "/ready", "/version", "/docs", "/openapi.json"}


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
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/models", "/metrics", TOKENIZE, "/v1/experts"])
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
            check_parser_error(answer)
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
