"""HTTP written by hand, for what a client library would not send."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.checked_responses import check_response_of_some_path

JSON = ("Content-Type", "application/json")


@dataclass(frozen=True)
class RawAnswer:
    """What an httpx.Response has too, under the same names."""

    status_code: int
    headers: Mapping[str, str]
    """By names in lower case."""
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


def head(method: str, target: str, *headers: tuple[str, str | bytes]) -> bytes:
    """The first bytes of a request up to its body. Nothing is added but a Host, where none is given."""
    lines = [f"{method} {target} HTTP/1.1".encode()]
    if not any(name.lower() == "host" for name, _ in headers):
        lines.append(b"Host: test")
    for name, value in headers:
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode("latin-1")))
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(target: str, body: bytes, *headers: tuple[str, str | bytes]) -> bytes:
    """A whole POST of JSON."""
    return head("POST", target, JSON, ("Content-Length", str(len(body))), *headers) + body


def chunked(body: bytes, size: int) -> Iterator[bytes]:
    """`body` in chunks of `size` bytes, some hundred chunks a piece, with the end of the body."""
    pieces = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + size] for i in range(0, len(body), size))]
    pieces.append(b"0\r\n\r\n")
    for start in range(0, len(pieces), 500):
        yield b"".join(pieces[start : start + 500])


@contextlib.contextmanager
def connection(url: str, *, seconds: float = 20) -> Iterator[socket.socket]:
    """A connection to the server at `url`, each of whose reads and writes may take `seconds`."""
    address = urlsplit(url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=seconds) as sock:
        yield sock


def read_answer(sock: socket.socket) -> RawAnswer:
    """The next answer, of an allowed shape. Raises http.client.BadStatusLine where there is none."""
    with contextlib.closing(http.client.HTTPResponse(sock)) as response:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = RawAnswer(response.status, headers, response.read())
    check_response_of_some_path(answer.status_code, answer.headers, answer.content)
    return answer


def exchange(url: str, pieces: Iterable[bytes], *, seconds: float = 20) -> RawAnswer:
    """Send `pieces` on a connection of their own, as far as the server reads them, and read one answer."""
    with connection(url, seconds=seconds) as sock:
        with contextlib.suppress(ConnectionError):  # the answer may come before the end
            for piece in pieces:
                sock.sendall(piece)
        return read_answer(sock)
