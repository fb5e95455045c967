"""429 for a key that has as many requests running as one key may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge.paths import route_path
from server.errors import ApiError

_GENERATES = frozenset({"/v1/completions", "/v1/chat/completions"})


class KeyLimit:
    """At most `limit` requests that generate for each key; without keys, for all clients together.

    A request counts until the app is done with it: at its last byte, when its client has left, or at any error.
    """

    def __init__(self, app: ASGIApp, limit: int, count_rejected: Callable[[str], None]) -> None:
        self._app = app
        self._limit = limit
        self._count_rejected = count_rejected
        self._running: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) not in _GENERATES:
            await self._app(scope, receive, send)
            return
        key_id = scope.get("state", {}).get("key_id")
        if self._running[key_id] >= self._limit:
            self._count_rejected("rate_limit_exceeded")
            await self._too_many().response()(scope, receive, send)
            return
        self._running[key_id] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[key_id] -= 1

    def _too_many(self) -> ApiError:
        return ApiError(
            429,
            f"At most {self._limit} requests may run at once for one key; wait for one of them to end.",
            code="rate_limit_exceeded",
            headers={"Retry-After": "1"},
        )
