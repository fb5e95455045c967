"""Routes whose body is read by the parser of server/json_io.py instead of the standard library's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from server.errors import ApiError, BadBodyError
from server.json_io import NotFiniteError, parse

_LARGE = 64 * 1024
"""A longer body, in bytes, is read in a thread."""


class JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return await asyncio.to_thread(parse, body) if len(body) > _LARGE else parse(body)
        except NotFiniteError as error:
            raise BadBodyError(
                f"{error.field or 'The body'} has a number that is not finite.", param=error.field
            ) from None
        except ValueError as error:
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from None


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_json(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise ApiError(415, "The Content-Type must be application/json.")
            return await handle(JsonRequest(request.scope, request.receive))

        return with_json
