"""Every error leaves in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and tells no internals.

| what happened                           | status | type                  | code                    |
|-----------------------------------------|--------|-----------------------|-------------------------|
| a mistake in the request                | 400    | invalid_request_error | null                    |
| prompt (+ max_tokens) over the context  | 400    | invalid_request_error | context_length_exceeded |
| no API key, or a wrong one              | 401    | invalid_request_error | invalid_api_key         |
| unknown model                           | 404    | invalid_request_error | model_not_found         |
| unknown route, wrong method             | 404/405| invalid_request_error | null                    |
| body or headers too slow                | 408    | invalid_request_error | null                    |
| body too large, not JSON by its header  | 413/415| invalid_request_error | null                    |
| too many requests of one key            | 429    | rate_limit_error      | rate_limit_exceeded     |
| headers too large                       | 431    | invalid_request_error | null                    |
| queue full, draining, still loading     | 503    | server_error          | server_overloaded       |
| this request failed inside the engine   | 500    | server_error          | null                    |
| the engine process is gone              | 500    | server_error          | engine_dead             |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi import HTTPException as FastApiError
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestFailedError,
)
from server.json_io import JsonResponse
from server.protocol.errors import ErrorBody

log = logging.getLogger(__name__)

_PLAIN = "/:@!$&'()*+,;=~"
"""Characters of a path that are told as they are."""


class ApiError(Exception):
    """An answer other than success. `headers` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        return JsonResponse(self.body, status_code=self.status, headers=self.headers)


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


class BadRequestError(ApiError):
    """400: the client's mistake; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


class BadBodyError(FastApiError):
    """The same, raised while the body is read, where FastAPI lets none but its own exceptions pass."""

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(400, message)
        self.param = param


def overloaded(message: str, *, retry_after: int = 1) -> ApiError:
    """503 with Retry-After: not now, perhaps later."""
    return ApiError(503, message, code="server_overloaded", headers={"Retry-After": str(retry_after)})


def to_api_error(error: Exception) -> ApiError:
    """What a client is told about `error`. What it is not told goes to the log."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return BadRequestError(str(error), param=error.param, code=error.code)
        case EngineOverloadedError():
            return overloaded(str(error), retry_after=error.retry_after)
        case RequestFailedError():
            log.error("a request failed in the engine: %s", error)
            return ApiError(500, "The request failed inside the engine.")
        case EngineDeadError():
            return ApiError(500, "The engine stopped; the request is lost.", code="engine_dead")
        case BadBodyError():
            return BadRequestError(str(error.detail), param=error.param)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            log.error("unexpected error", exc_info=error)
            return ApiError(500, "Something went wrong in the server.")


def install(app: FastAPI, count_rejected: Callable[[str], None]) -> None:
    """Make every way out of `app` speak OpenAI's error shape; `count_rejected` is told the reason of each refusal."""

    def answer(error: ApiError) -> Response:
        if error.status != 500:
            count_rejected(error.code or "invalid_request")
        return error.response()

    async def known(_: Request, error: Exception) -> Response:
        return answer(to_api_error(error))

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(_validation_error(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):  # no request for the model, so none that was refused
            return _http_error(request, error).response()
        return answer(to_api_error(error))

    async def nobody(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # the client has left; this goes nowhere

    app.add_exception_handler(ClientLeftError, nobody)
    for kind in (ApiError, EngineError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)


def _http_error(request: Request, error: HTTPException) -> ApiError:
    where = (
        f"{request.method} {quote(request.scope['path'][:200], safe=_PLAIN)}"  # request.url believes the Host header
    )
    message = f"There is no {where}." if error.status_code == 404 else f"{where} is not allowed."
    return ApiError(error.status_code, message, headers=error.headers)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing wrong, in one sentence: pydantic's location becomes `messages[3].content`."""
    first = error.errors()[0]
    param: str | None = None
    where = ""
    for part in first["loc"][1:]:  # the first part says "body"
        if isinstance(part, int):
            where += f"[{part}]"
        elif not where:
            where = param = str(part)
        else:
            where += f".{part}"
    if not where:
        return BadRequestError("The body must be a JSON object.")
    wrong = "is required" if first["type"] == "missing" else _in_words(first["type"], str(first["msg"]))
    return BadRequestError(f"{where[:200]} {wrong}.", param=param)


def _in_words(kind: str, message: str) -> str:
    expected = {
        "bool_type": "must be true or false",
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "string_type": "must be a string",
        "list_type": "must be a list",
        "dict_type": "must be an object",
        "model_type": "must be an object",
        "model_attributes_type": "must be an object",
    }
    return expected.get(kind, message[:1].lower() + message[1:])
