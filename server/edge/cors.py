"""Pages of other origins, as far as they are allowed."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import BadRequestError
from server.json_io import JsonResponse


class Cors(CORSMiddleware):
    """Lets pages of `origins` read answers. No cookies are involved: a page sends the key itself."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        allowed = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        reason = bytes(response.body).decode()
        return JsonResponse(BadRequestError(f"{reason}.").body, response.status_code, allowed)
