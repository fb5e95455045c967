"""What nothing else answered."""

from __future__ import annotations

import json

import pytest
from starlette.types import Receive, Scope, Send

from server.edge.last_resort import LastResort
from tests.server.edge.asgi import call


def test_an_exception_is_a_500_that_tells_nothing() -> None:
    async def breaks(*_: object) -> None:
        raise ZeroDivisionError("secret")

    start, body = call(LastResort(breaks))
    assert start["status"] == 500
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "secret" not in error["message"]
    assert "division" not in error["message"]


def test_it_is_too_late_in_an_answer() -> None:
    async def breaks(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(LastResort(breaks))
