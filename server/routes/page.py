"""GET /: the page that shows the experts, and its files under /page. Data it asks for itself: none is in them."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from server.static_folder import StaticFolder

FOLDER = Path(__file__).parent.parent / "static" / "page"


def file_of(path: str) -> str:
    """The name in FOLDER of what `path` asks for; for any other path, a name of no file."""
    return "index.html" if path == "/" else path.removeprefix("/page/")


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    folder = StaticFolder(FOLDER)

    @routes.head("/")
    @routes.get("/")
    async def page(request: Request) -> Response:
        return await folder.response("index.html", request.scope)

    @routes.head("/page/{name:path}")
    @routes.get("/page/{name:path}")
    async def asset(name: str, request: Request) -> Response:
        return await folder.response(name, request.scope)

    return routes
