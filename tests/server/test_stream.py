"""EventStream and ChunkWriter, driven as an HTTP server drives them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Message, Scope

from engine.errors import EngineDeadError, EngineOverloadedError, RequestFailedError
from server.errors import ClientLeftError
from server.stream import ChunkWriter, EventStream, until_client_leaves

SCOPE: Scope = {"type": "http", "method": "POST", "headers": []}


@dataclass
class Connection:
    """One client: what it was sent, and when it leaves."""

    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: the client reads nothing, and sending waits."""
    closed: bool = False

    def __post_init__(self) -> None:
        self.reads.set()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


async def steps(*items: bytes | Exception) -> AsyncGenerator[bytes, None]:
    for item in items:
        await asyncio.sleep(0)
        if isinstance(item, Exception):
            raise item
        yield item


def run(events: AsyncGenerator[bytes, None], change: Callable[[Connection], None] = lambda _: None) -> Connection:
    async def main() -> Connection:
        connection = Connection()
        change(connection)
        response = EventStream(events, connection.close)
        await asyncio.wait_for(response(SCOPE, connection.receive, connection.send), 5)
        return connection

    return asyncio.run(main())


def test_a_whole_stream() -> None:
    connection = run(steps(b"data: 1\n\n", b"data: 2\n\n"))
    assert connection.status == 200
    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert connection.body == b"data: 1\n\ndata: 2\n\n"
    assert [message.get("more_body", False) for message in connection.sent[1:]] == [True, True, False]
    assert connection.closed


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineDeadError("pid 7 gone"), 500, "engine_dead"),
        (EngineOverloadedError("full"), 503, "server_overloaded"),
        (RequestFailedError("tensor of shape (3, 4)"), 500, None),
        (ZeroDivisionError("in line 7"), 500, None),
    ],
)
def test_what_fails_before_the_first_event_is_a_plain_error(error: Exception, status: int, code: str | None) -> None:
    connection = run(steps(error))
    assert connection.status == status
    assert json.loads(connection.body)["error"]["code"] == code
    assert dict(connection.sent[0]["headers"])[b"content-type"] == b"application/json"
    assert connection.closed


def test_what_fails_later_is_a_last_event() -> None:
    connection = run(steps(b"data: 1\n\n", RequestFailedError("tensor of shape (3, 4)")))
    assert connection.status == 200
    first, last, rest = connection.body.split(b"\n\n")
    assert (first, rest) == (b"data: 1", b"")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    assert b"tensor" not in connection.body
    assert b"DONE" not in connection.body
    assert connection.closed


def test_a_client_that_leaves_ends_the_generator() -> None:
    ended: list[str] = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0.001)
        finally:
            ended.append("generator")

    async def main() -> Connection:
        connection = Connection()
        response = EventStream(endless(), connection.close)
        asyncio.get_running_loop().call_later(0.02, connection.left.set)
        await asyncio.wait_for(response(SCOPE, connection.receive, connection.send), 5)
        return connection

    connection = asyncio.run(main())
    assert ended == ["generator"]
    assert connection.closed
    assert len(connection.sent) > 2


@pytest.mark.parametrize("when", ["at once", "before the first event", "while nothing is read"])
def test_a_client_that_leaves_early_or_reads_nothing(when: str) -> None:
    """The generator may never have been started, or be in the middle of a send: the job is closed all the same."""

    async def first() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.01 if when == "while nothing is read" else 60)
        yield b"data: 1\n\n"

    async def main() -> Connection:
        connection = Connection()
        if when == "at once":
            connection.left.set()
        if when == "while nothing is read":
            connection.reads.clear()
        response = EventStream(first(), connection.close)
        asyncio.get_running_loop().call_later(0.05, connection.left.set)
        await asyncio.wait_for(response(SCOPE, connection.receive, connection.send), 5)
        return connection

    connection = asyncio.run(main())
    assert connection.closed
    assert connection.sent == []


def test_work_ends_with_its_client() -> None:
    cancelled: list[bool] = []

    async def work() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return 1

    async def main() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.01, connection.left.set)
        with pytest.raises(ClientLeftError):
            await until_client_leaves(connection.receive, work())
        assert cancelled == [True]

    asyncio.run(main())


def test_work_that_ends_first_gives_its_result_or_error() -> None:
    async def good() -> int:
        return 7

    async def bad() -> int:
        raise RequestFailedError("why")

    async def main() -> None:
        connection = Connection()
        assert await until_client_leaves(connection.receive, good()) == 7
        with pytest.raises(RequestFailedError, match="why"):
            await until_client_leaves(connection.receive, bad())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks(include_usage: bool) -> None:
    head = {"id": 'a"b', "object": "x", "created": 5, "model": "é"}
    writer = ChunkWriter(head, include_usage=include_usage)
    choice: dict[str, Any] = {"index": 0, "text": "line\nend\u2028 \x00"}
    event = writer.choice(choice)
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    expected = head | {"choices": [choice]} | ({"usage": None} if include_usage else {})
    assert json.loads(event.removeprefix(b"data: ")) == expected
    usage = json.loads(writer.usage({"total_tokens": 3}).removeprefix(b"data: "))
    assert usage == head | {"choices": [], "usage": {"total_tokens": 3}}
