"""One line of JSON for each request: who asked for what, and how it ended. No prompts, queries, headers or keys."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.log_lines import BackgroundLines
from server.protocol.common import Usage

log = logging.getLogger("server.access")

End = Literal["finished", "client_left", "aborted"]
_MAX_TEXT = 200


@contextmanager
def lines_to(stream: TextIO) -> Iterator[None]:
    """Write the log to `stream`, and nowhere else, until the block ends."""
    handler = BackgroundLines(stream)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = True
        handler.close()


class AccessLog:
    """Writes the line of a request when its answer has ended.

    What others know of it is in the request's state: `request_id`; `key_id` when it has a key; `usage`, a function,
    when it generates.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        came, start = time.time(), time.monotonic()
        status: int | None = None
        end: End = "aborted"

        async def watched_send(message: Message) -> None:
            nonlocal status, end
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False) and end != "client_left":
                end = "finished"

        async def watched_receive() -> Message:
            nonlocal end
            message = await receive()
            if message["type"] == "http.disconnect" and end != "finished":
                end = "client_left"
            return message

        try:
            await self._app(scope, watched_receive, watched_send)
        finally:
            state = scope["state"]
            usage = state["usage"]() if "usage" in state else None
            write_line(
                came=came,
                request_id=state["request_id"],
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=time.monotonic() - start,
                client=scope.get("client"),
                key_id=state.get("key_id"),
                end=end,
                usage=usage,
            )


def write_line(
    *,
    came: float,
    request_id: str,
    method: str | None,
    path: str | None,
    status: int | None,
    seconds: float,
    client: tuple[str, int] | None,
    key_id: str | None = None,
    end: End,
    usage: Usage | None = None,
) -> None:
    """`came` is in seconds since 1970. What is not known of a request that was no HTTP is None."""
    line: dict[str, object] = {
        "time": datetime.fromtimestamp(came, UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": method,
        "path": None if path is None else path[:_MAX_TEXT],
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
        "client": None if client is None else f"{client[0]}:{client[1]}"[:_MAX_TEXT],
        "key_id": key_id,
        "end": end,
    }
    if usage is not None:
        line |= {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}
    log.info("%s", json.dumps(line))
