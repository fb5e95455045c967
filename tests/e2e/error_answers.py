"""What every refusal must look like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

INTERNALS = re.compile(r"Traceback|pydantic|starlette|fastapi|uvicorn|torch|\.py\b|site-packages|0x[0-9a-f]{6}|\n")


class Answer(Protocol):
    """An httpx.Response, or an answer that was read by hand."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def content(self) -> bytes: ...

    def json(self) -> Any: ...


def check_error(answer: Answer, status: int, *, param: str | None, code: str | None) -> dict[str, Any]:
    """The error object of `answer`: of this status and exactly OpenAI's fields, with nothing of the server's insides in
    its message.
    """
    assert answer.status_code == status, answer.content[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"]
    assert len(error["message"]) < 1000
    assert not INTERNALS.search(error["message"]), error["message"]
    if status == 503:
        assert int(answer.headers["retry-after"]) >= 1
    if status == 405:
        assert answer.headers["allow"]
    return error


def check_parser_error(answer: Answer) -> None:
    """That `answer` is the HTTP parser's: a 400 or 431, in plain text or in the error shape."""
    assert answer.status_code in (400, 431), answer.content[:500]
    if answer.headers["content-type"] == "application/json":
        check_error(answer, answer.status_code, param=None, code=None)
    assert len(answer.content) < 1000
