"""A server that answers every request with bytes a test has written, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stub:
    url: str
    answers: list[list[bytes]]
    """For each request in turn, the parts that are sent, each in a packet of its own."""
    heads: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    client_left: bool = False
    """Before it had read the whole of an answer."""


def answer(content: bytes, *, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> bytes:
    """A whole HTTP answer that ends with the connection."""
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n".encode() + content


def stream(*events: str, end: str = "data: [DONE]\n\n") -> bytes:
    content = "".join(f"data: {event}\n\n" for event in events) + end
    return answer(content.encode(), headers="Content-Type: text/event-stream\r\n")


def chunk(text: str | None = None, finish_reason: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}, ensure_ascii=False)


@contextmanager
def stub_server(*answers: bytes | list[bytes]) -> Iterator[Stub]:
    """Serve one connection after the other, as many as there are answers, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        parts = [[content] if isinstance(content, bytes) else content for content in answers]
        stub = Stub(f"http://127.0.0.1:{port}", parts)
        thread = threading.Thread(target=_serve, args=(listener, stub))
        thread.start()
        try:
            yield stub
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def _serve(listener: socket.socket, stub: Stub) -> None:
    for parts in stub.answers:
        try:
            connection, _ = listener.accept()
        except OSError:  # the test is over
            return
        with connection, connection.makefile("rb") as reader:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = ""
            while not head.endswith("\r\n\r\n"):
                head += reader.readline().decode()
            stub.heads.append(head)
            length = [int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")]
            stub.bodies.append(json.loads(reader.read(length[0])) if length else None)
            try:
                for part in parts:
                    connection.sendall(part)
            except ConnectionError:
                stub.client_left = True
