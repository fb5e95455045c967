"""413 for a body that is too large, 408 for one that takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError


class BodyLimits:
    """Reads every body into one piece before the app sees the request, so that no form of sending it costs memory."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, count_rejected: Callable[[str], None]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._count_rejected = count_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        try:
            if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
                raise self._too_large()
            body = await self._read(receive)
        except ApiError as error:
            self._count_rejected("invalid_request")
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client left; there is nobody to answer
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def once() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        await self._app(scope, once, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None when the client leaves. Raises ApiError."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive within {self._seconds:g} seconds.", headers={"Connection": "close"}
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body may have up to {self._max_bytes} bytes.")
