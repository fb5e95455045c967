"""401 for whoever has no key, on every path that is not listed here as open."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge.keys import ApiKey, find_key
from server.edge.paths import route_path
from server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/ready", "/version"})
"""To be read without a key: none of them holds data."""
_ASSET = re.compile(r"/(docs|page)(/[\w-][\w.-]*)+", re.ASCII)
"""No part of it begins with a dot, so none leaves the folder."""


class Auth:
    """Lets requests through that are open or carry one of `keys`, and notes whose they are: `key_id` in their state."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], count_rejected: Callable[[str], None]) -> None:
        self._app = app
        self._keys = tuple(keys)
        self._count_rejected = count_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served
        if not is_open(scope["method"], route_path(scope)):
            given = _bearer_token(scope)
            key = None if given is None else find_key(self._keys, given)
            if key is None:
                self._count_rejected("invalid_api_key")
                await _unauthorized(given).response()(scope, receive, send)
                return
            scope.setdefault("state", {})["key_id"] = key.id
        await self._app(scope, receive, send)


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return method in ("GET", "HEAD") and (path in OPEN_PATHS or _ASSET.fullmatch(path) is not None)


def _bearer_token(scope: Scope) -> bytes | None:
    """None unless there is exactly one: of two, a proxy in front may have looked at the other."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(b" ")
    return token.strip(b" \t") if scheme.lower() == b"bearer" else None


def _unauthorized(given: bytes | None) -> ApiError:
    message = (
        "This needs an API key, in one header: Authorization: Bearer KEY." if given is None else "The API key is wrong."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
