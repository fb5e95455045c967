"""Server-sent events, and answers that end when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientLeftError, to_api_error
from server.json_io import dump

DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class ChunkWriter:
    """Writes the chunks of one stream. What is the same in all of them is put into JSON once."""

    def __init__(self, head: Mapping[str, object], *, include_usage: bool) -> None:
        self._head = b"data: " + dump(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def choice(self, choice: Mapping[str, object]) -> bytes:
        return self._head + dump(choice) + self._tail

    def usage(self, usage: Mapping[str, object]) -> bytes:
        return self._head + b'],"usage":' + dump(usage) + b"}\n\n"


class EventStream(Response):
    """Sends `events`, each a whole server-sent event, and calls `close` at the end, whatever it was.

    Nothing is sent before the first event is there: what fails until then is an ordinary HTTP error. What fails later
    is a last event with the error object. When the client leaves, the generator is cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_client_leaves(receive, self._send_all(scope, receive, send))
        except ClientLeftError:
            pass
        finally:
            self._close()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            event = await anext(self._events)
        except Exception as error:
            await to_api_error(error).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": event, "more_body": True})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            event = b"data: " + dump(to_api_error(error).body) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first: that raises ClientLeftError.

    The request's body must have been read before.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_client_leaves(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
