"""GET /openapi.json, and /docs: the same as a page to read and to try out. Nothing of it comes from elsewhere.

server/static/swagger holds index.html and init.js, which are ours, and of swagger-ui-dist 5.35.0, unchanged, the
script, the style sheet and their licences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from server.json_io import dump
from server.static_folder import StaticFolder

_FOLDER = Path(__file__).parent.parent / "static" / "swagger"


def router(document: Callable[[], Mapping[str, Any]]) -> APIRouter:
    """`document` makes the OpenAPI document, when it is first asked for."""
    routes = APIRouter(include_in_schema=False)
    folder = StaticFolder(_FOLDER)
    written = cache(lambda: dump(document()))

    @routes.get("/openapi.json")
    async def openapi() -> Response:
        return Response(await asyncio.to_thread(written), media_type="application/json")

    @routes.get("/docs")
    async def page(request: Request) -> Response:
        return await folder.response("index.html", request.scope)

    @routes.get("/docs/{name}")
    async def asset(name: str, request: Request) -> Response:
        return await folder.response(name, request.scope)

    return routes
