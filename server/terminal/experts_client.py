"""The events of a running server, one a second."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import httpx2
import msgspec

from server.protocol.live import LiveEvent
from server.terminal.http import ClientError, ErrorObject, HttpClient, reported

_SILENT_SECONDS = 10.0

PATH = "/v1/experts/events"


class _Failure(msgspec.Struct):
    error: ErrorObject | str


def live_events(url: str, api_key: str | None) -> Generator[LiveEvent]:
    """Event after event, until the server leaves or breaks: always a ClientError in the end."""
    with HttpClient(url, api_key, silent_seconds=_SILENT_SECONDS) as http, http.ask("GET", PATH) as response:
        for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                raise ClientError("the server has shut down")
            yield _decode(event.data)
    raise ClientError("the server ended the stream before its time")


def first_routing(url: str, api_key: str | None) -> LiveEvent:
    """The first event that knows of routing, or says that none is recorded. Raises ClientError."""
    with closing(live_events(url, api_key)) as events:
        return next(event for event in events if event["routing"] is not None or not event["model"]["record_routing"])


def _decode(data: str) -> LiveEvent:
    try:
        failure = msgspec.json.decode(data, type=_Failure)
    except (msgspec.ValidationError, RecursionError):
        pass
    except ValueError:
        raise ClientError("the server sent what mixserve never sends: is the URL right?") from None
    else:
        raise reported(failure.error, "the server reports an error")
    try:
        return msgspec.json.decode(data, type=LiveEvent)
    except (ValueError, RecursionError):
        raise ClientError("the server sent what mixserve never sends: is it of another version?") from None
