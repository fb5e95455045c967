"""The path that the middleware judges is the one that the router takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.routing import Match, Route
from starlette.types import Message, Scope

from server.edge.paths import PrefixSlash, RootPath, route_path
from tests.server.edge.asgi import call

_PARTS = st.lists(st.sampled_from(["/", "a", "b", "health", "/health", "..", "//", "%2f", "é"]), max_size=6)


@given(path=_PARTS.map("".join), root=st.sampled_from(["", "/a", "/a/b", "/health"]))
@example(path="/a", root="/a")
@example(path="/a/a/health", root="/a")
def test_it_is_the_routers_path(path: str, root: str) -> None:
    scope: Scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    found = route_path(scope)
    for route in ("/health", "/a/health", "/b", "/{rest:path}"):
        matched, child = Route(route, lambda _: None).matches(scope)
        if route != "/{rest:path}":
            assert (matched is Match.FULL) == (found == route)
        elif matched is Match.FULL:
            assert f"/{child['path_params']['rest']}" == found
        else:
            assert not found.startswith("/")


def test_the_prefix_is_told_to_all_below() -> None:
    seen: list[str] = []

    async def app(scope: Scope, *_: Any) -> None:
        seen.append(scope["root_path"])

    call(RootPath(app, "/mixserve"))
    assert seen == ["/mixserve"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/mixserve", 307),
        ("HEAD", "/mixserve", 307),
        ("POST", "/mixserve", 200),
        ("GET", "/mixserve/", 200),
        ("GET", "/mixserve2", 200),
    ],
)
def test_the_prefix_alone_gets_its_slash(method: str, path: str, status: int) -> None:
    """A relative path in Location: no Host of the client's is repeated."""

    async def app(_scope: Scope, _receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    start = call(PrefixSlash(app, "/mixserve"), method=method, path=path)[0]
    assert start["status"] == status
    assert dict(start["headers"]).get(b"location") == (b"/mixserve/" if status == 307 else None)
