"""What answers while the model is loading, and hands over to the app afterwards."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import EdgeConfig
from server.edge.paths import route_path
from server.edge.stack import wrap
from server.errors import overloaded
from server.json_io import JsonResponse


class Front:
    """The ASGI app that the HTTP server runs from its first second: `_loading` until `put` is given the real one.

    Keys and limits are the same for both; the real app brings its own middleware.
    """

    def __init__(self, edge: EdgeConfig) -> None:
        self._app = wrap(_loading, edge)
        self._count_rejected: Callable[[str], None] | None = None

    def put(self, app: ASGIApp, count_rejected: Callable[[str], None]) -> None:
        """`count_rejected` is told from now on what the connections refuse."""
        self._app = app
        self._count_rejected = count_rejected

    def count_rejected(self, reason: str) -> None:
        """Lost while there is no app yet, and so nothing that counts."""
        if self._count_rejected is not None:
            self._count_rejected(reason)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    """Alive, but not ready: /health is 200, everything else 503 with Retry-After."""
    if scope["type"] != "http":
        return
    if route_path(scope) == "/health":
        response = JsonResponse({"status": "loading"})
    else:
        response = overloaded("The model is still loading.", retry_after=5).response()
    await response(scope, receive, send)
