"""The middleware around the app, and around whatever answers before there is one."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp

from server.config import EdgeConfig
from server.edge.access_log import AccessLog
from server.edge.auth import Auth
from server.edge.body import BodyLimits
from server.edge.cors import Cors
from server.edge.key_limit import KeyLimit
from server.edge.last_resort import LastResort
from server.edge.paths import PrefixSlash, RootPath
from server.edge.request_ids import RequestIds


def middleware(config: EdgeConfig, count_rejected: Callable[[str], None]) -> list[Middleware]:
    """Outermost first. `count_rejected` is told the reason of each refusal."""
    stack = [Middleware(RootPath, config.root_path)] if config.root_path else []
    stack += [Middleware(RequestIds), Middleware(AccessLog)]  # whoever answers below: it has an id and is written down
    if config.root_path:
        stack.append(Middleware(PrefixSlash, config.root_path))
    if config.allowed_origins:
        # Before the keys: a browser sends none when it asks beforehand, and must be let read a 401 or a 500.
        stack.append(Middleware(Cors, config.allowed_origins))
    stack.append(Middleware(LastResort))
    if config.api_keys:
        # Before all that costs memory or a place: a stranger gets neither.
        stack.append(Middleware(Auth, config.api_keys, count_rejected))
    if config.max_concurrent_per_key is not None:
        # Before the body is read: a body on its way is a request that runs.
        stack.append(Middleware(KeyLimit, config.max_concurrent_per_key, count_rejected))
    stack.append(Middleware(BodyLimits, config.max_body_bytes, config.body_seconds, count_rejected))
    return stack


def wrap(app: ASGIApp, config: EdgeConfig) -> ASGIApp:
    """`app` behind the same; its refusals are not counted."""
    for item in reversed(middleware(config, lambda _: None)):
        app = item.cls(app, *item.args, **item.kwargs)
    return app
