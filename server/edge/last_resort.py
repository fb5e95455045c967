"""An answer whatever happens."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import to_api_error


class LastResort:
    """An exception that nothing else answered is a 500 in the error shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if started:
                raise  # too late for a status; the HTTP server closes the connection
            await to_api_error(error).response()(scope, receive, send)
