"""Looks at every response that httpx, httpx2 and the `openai` client read, whoever made the client and in what thread.

A response that tests/shapes.py does not allow is written down, not raised: the client may be in a thread, or its error
be swallowed by what is tested. The fixtures of tests/conftest.py fail the test afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import httpx
import httpx2

from tests.shape_checks import check, check_stream
from tests.shapes import CHUNKS, LIVE, NOT_JSON, WHOLE


@contextmanager
def checked_responses() -> Iterator[list[str]]:
    """Check every response until the block ends. Gives the list that wrong ones are written to."""
    wrong: list[str] = []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def handle_request(transport: Any, request: Any) -> Any:
            response = original(transport, request)
            response.stream = _Watched(response.stream, _finish(request, response, wrong))
            return response

        return handle_request

    def wrap_async(original: Callable[..., Any]) -> Callable[..., Any]:
        async def handle_async_request(transport: Any, request: Any) -> Any:
            response = await original(transport, request)
            response.stream = _AsyncWatched(response.stream, _finish(request, response, wrong))
            return response

        return handle_async_request

    with (
        patch.object(httpx.HTTPTransport, "handle_request", wrap(httpx.HTTPTransport.handle_request)),
        patch.object(httpx2.HTTPTransport, "handle_request", wrap(httpx2.HTTPTransport.handle_request)),
        patch.object(
            httpx.AsyncHTTPTransport, "handle_async_request", wrap_async(httpx.AsyncHTTPTransport.handle_async_request)
        ),
        patch.object(
            httpx2.AsyncHTTPTransport,
            "handle_async_request",
            wrap_async(httpx2.AsyncHTTPTransport.handle_async_request),
        ),
    ):
        yield wrong


class _Watched(httpx.SyncByteStream, httpx2.SyncByteStream):
    """A response's body on its way to the reader. `finish` gets what was read, and whether that is all."""

    def __init__(self, inner: Any, finish: Callable[[bytes, bool], None]) -> None:
        self._inner = inner
        self._finish = finish
        self._read = bytearray()
        self._whole = False

    def __iter__(self) -> Iterator[bytes]:
        for part in self._inner:
            self._read += part
            yield part
        self._whole = True

    def close(self) -> None:
        self._inner.close()
        self._finish(bytes(self._read), self._whole)


class _AsyncWatched(httpx.AsyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, inner: Any, finish: Callable[[bytes, bool], None]) -> None:
        self._inner = inner
        self._finish = finish
        self._read = bytearray()
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            self._read += part
            yield part
        self._whole = True

    async def aclose(self) -> None:
        await self._inner.aclose()
        self._finish(bytes(self._read), self._whole)


def _finish(request: Any, response: Any, wrong: list[str]) -> Callable[[bytes, bool], None]:
    def finish(content: bytes, whole: bool) -> None:
        if request.method == "HEAD":
            return
        try:
            check_response(request.url.path, response.status_code, response.headers, content, whole=whole)
        except (AssertionError, ValueError, KeyError) as error:
            wrong.append(f"{request.method} {request.url.path} {response.status_code}: {error!r} in {content[:1000]!r}")

    return finish


def check_response(path: str, status: int, headers: Mapping[str, str], content: bytes, *, whole: bool = True) -> None:
    """Raise AssertionError or ValueError unless an answer is as it should be. `headers` have names in lower case.

    `whole` is false when its reader left before the end.
    """
    assert re.fullmatch(r"[\w.:/+=@-]{1,128}", headers.get("x-request-id", "")), headers
    kind = headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        assert status == 200, f"a stream with status {status}"
        check_stream(path, _events(content, whole=whole), whole=whole)
    elif status == 200 and NOT_JSON.fullmatch(path):
        assert kind != "application/json"
    elif whole:
        assert kind == "application/json", f"content type {kind!r}"
        body = json.loads(content)
        check(path, status, body)
        if status != 200 and body["error"]["code"] in ("server_overloaded", "rate_limit_exceeded"):
            assert int(headers["retry-after"]) > 0, headers


def check_response_of_some_path(status: int, headers: Mapping[str, str], content: bytes) -> None:
    """The same for JSON and streams of a reader that does not know what was asked: there must be a path they fit."""
    kind = headers.get("content-type", "").partition(";")[0]
    if kind not in ("application/json", "text/event-stream"):
        return
    wrong = []
    for path in CHUNKS | LIVE if kind == "text/event-stream" else WHOLE:
        try:
            check_response(path, status, headers, content)
        except (AssertionError, ValueError, KeyError) as error:
            wrong.append(f"{path}: {error!r}")
        else:
            return
    raise AssertionError("\n".join(wrong))


def _events(content: bytes, *, whole: bool) -> list[str]:
    *events, rest = content.decode(errors="strict" if whole else "ignore").split("\n\n")
    assert rest == "" or not whole, f"the stream ends within an event: {rest!r}"
    for event in events:
        assert event.startswith("data: "), event
        assert "\n" not in event, event
    return [event.removeprefix("data: ") for event in events]
