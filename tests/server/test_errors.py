"""What clients are told about errors."""

from __future__ import annotations

import logging

import pytest

from engine.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestFailedError,
)
from server.errors import ApiError, BadRequestError, overloaded, to_api_error


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (BadRequestError("m", param="p"), 400, "invalid_request_error", "p", None),
        (InvalidRequestError("m", param="p", code="c"), 400, "invalid_request_error", "p", "c"),
        (ContextLengthError("m", param="prompt"), 400, "invalid_request_error", "prompt", "context_length_exceeded"),
        (ApiError(404, "m", code="model_not_found"), 404, "invalid_request_error", None, "model_not_found"),
        (EngineOverloadedError("m"), 503, "server_error", None, "server_overloaded"),
        (overloaded("m"), 503, "server_error", None, "server_overloaded"),
        (RequestFailedError("secret"), 500, "server_error", None, None),
        (EngineDeadError("secret"), 500, "server_error", None, "engine_dead"),
        (ConfigurationError("secret"), 500, "server_error", None, None),
        (KeyError("secret"), 500, "server_error", None, None),
    ],
)
def test_the_table(error: Exception, status: int, kind: str, param: str | None, code: str | None) -> None:
    found = to_api_error(error)
    assert found.status == status
    assert found.body["error"]["type"] == kind
    assert (found.body["error"]["param"], found.body["error"]["code"]) == (param, code)
    assert "secret" not in found.message
    assert found.response().status_code == status


def test_when_to_come_back() -> None:
    assert to_api_error(EngineOverloadedError("full", retry_after=7)).response().headers["retry-after"] == "7"
    assert "retry-after" not in to_api_error(EngineDeadError("gone")).response().headers


def test_what_clients_are_not_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        to_api_error(RequestFailedError("the reason inside"))
        to_api_error(ZeroDivisionError("a bug"))
    assert "the reason inside" in caplog.text
    assert "ZeroDivisionError: a bug" in caplog.text
