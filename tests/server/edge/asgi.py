"""ASGI apps called by hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


def call(
    app: ASGIApp,
    *,
    method: str = "POST",
    path: str = "/",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: Sequence[bytes] | None = None,
    leaves: bool = False,
    **more: Any,
) -> list[Message]:
    """What `app` sends in answer to a body that comes in the given pieces, after which the client leaves or waits.

    With a body there is a header that says so. `more` goes into the scope.
    """
    pieces = deque(body or (b"",))
    sent: list[Message] = []

    async def receive() -> Message:
        if pieces:
            piece = pieces.popleft()
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or leaves}
        if leaves:
            return {"type": "http.disconnect"}
        await asyncio.sleep(3600)
        raise AssertionError("nobody waits that long")

    async def send(message: Message) -> None:
        sent.append(message)

    framing = [] if body is None else [(b"transfer-encoding", b"chunked")]
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [*headers, *framing],
        "client": ("127.0.0.1", 5),
        "state": {},
        **more,
    }

    async def main() -> None:
        await app(scope, receive, send)

    asyncio.run(main())
    return sent


async def reads_all(_: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes, and of messages, that the body came in."""
    size = num_messages = 0
    more = True
    while more:
        message = await receive()
        num_messages += 1
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{size} in {num_messages}".encode()})
