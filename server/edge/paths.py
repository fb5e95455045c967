"""Which route a request asks for, behind a proxy that serves the API under a prefix."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Tells all below the prefix under which a proxy serves the API, whether or not the proxy takes it off."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self._root_path
        await self._app(scope, receive, send)


class PrefixSlash:
    """Sends who asks for the prefix alone to it with a slash, from where the page's relative links are right."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] == self._root_path and scope["method"] in ("GET", "HEAD"):
            app = RedirectResponse(f"{self._root_path}/")
        await app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path that the router compares with its routes. The Host header, which is the client's, has no part in it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path
