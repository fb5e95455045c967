"""What answers while the model is loading, and hands over to the app afterwards."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import EdgeConfig
from server.edge.paths import route_path
from server.edge.stack import wrap
from server.errors import overloaded
from server.json_io import JsonResponse
from server.routes.page import FOLDER, file_of
from server.static_folder import StaticFolder


class Front:
    """The ASGI app that the HTTP server runs from its first second: `_Loading` until `put` is given the real one.

    Keys and limits are the same for both; the real app brings its own middleware.
    """

    def __init__(self, edge: EdgeConfig) -> None:
        self._app = wrap(_Loading(), edge)
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


class _Loading:
    """Alive, but not ready: /health is 200, the page is there, everything else 503 with Retry-After."""

    def __init__(self) -> None:
        self._page = StaticFolder(FOLDER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name = file_of(route_path(scope))
        response: Response
        if route_path(scope) == "/health":
            response = JsonResponse({"status": "loading"})
        elif name in self._page.names and scope["method"] in ("GET", "HEAD"):
            response = await self._page.response(name, scope)
        else:
            response = overloaded("The model is still loading.", retry_after=5).response()
        await response(scope, receive, send)
