"""One line of JSON for each request: who asked for what, and how it ended. No prompts, queries, headers or keys."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO, TypedDict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.log_lines import BackgroundLines

log = logging.getLogger("server.access")

End = Literal["finished", "client_left", "aborted"]
_MAX_TEXT = 200


class Tokens(TypedDict):
    """What the log takes of a request's usage."""

    prompt_tokens: int
    completion_tokens: int


@contextmanager
def logs_to(stream: TextIO) -> Iterator[None]:
    """Write to `stream` all that is logged, these lines among it, and nowhere else, until the block ends.

    All from one thread: a reader of `stream` that stops reading holds up nobody who logs.
    """
    root = logging.getLogger()
    before = root.handlers[:]
    handler = BackgroundLines(stream)
    handler.setFormatter(_Format("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)
        root.handlers[:] = before
        handler.close()


class _Format(logging.Formatter):
    """The lines of requests stay JSON."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == log.name else super().format(record)


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
    usage: Tokens | None = None,
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
