"""X-Request-Id, in and out."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PLAIN = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id when it is short and plain, else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if _PLAIN.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class RequestIds:
    """Every answer carries X-Request-Id, which is `request_id` in the request's state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = request_id_of(scope["headers"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
