"""A light HTTP/1.1 client: httptools over asyncio's own transports, with kept connections.

A load generator must not be what it measures. A streamed token costs this client 25 microseconds of processor time and
httpx2 92: at 2,000 tokens a second over 64 streams, 5 % of a core and 18 %.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

BodySink = Callable[[bytes, float], None]
"""Gets each part of a body and when it came, by time.perf_counter()."""

_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 2.0
"""A connection that was idle for longer is not used again: servers close theirs after 5 seconds and more."""


class HttpError(Exception):
    """No whole answer came; the message is one line. `kind` groups errors that are alike."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    """Empty where a sink got it."""


class HttpClient:
    """Talks to the server at `base_url` with `headers` in every request. For use inside one event loop."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (80 if self._tls is None else 443)
        self._prefix = parts.path.rstrip("/")
        fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes = b"", sink: BodySink | None = None) -> Response:
        """Send one request and read its answer; with a `sink`, that gets the body if the status is 200.

        Raises HttpError.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fields}Content-Length: {len(body)}\r\n\r\n"
        message = head.encode("latin-1") + body
        while True:
            kept = self._take()
            connection = kept or await self._connect()
            try:
                response = await connection.exchange(message, sink)
            except HttpError:
                # The server may have closed a kept connection at the very moment it was used again.
                if kept is None or connection.answered:
                    raise
                continue
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            return response

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take(self) -> _Connection | None:
        """The connection that was used last, if it is still good."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.last_used < _IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise HttpError("no connection", f"none within {_CONNECT_SECONDS:.0f} seconds") from None
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            words = "connection refused" if refused else error.strerror or str(error)
            raise HttpError("no connection", words) from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection, for one exchange at a time. The `on_…` methods are httptools' callbacks."""

    def __init__(self) -> None:
        self.reusable = False
        self.answered = False
        """Whether any byte has come in this exchange."""
        self.last_used = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._sink: BodySink | None = None
        self._received = 0.0
        self._status = 0
        self._body = bytearray()
        self._sized = False  # without a length, the body ends with the connection

    async def exchange(self, message: bytes, sink: BodySink | None) -> Response:
        """Send `message` and wait for the whole answer. Raises HttpError."""
        assert self._done is None
        self.reusable = self.answered = self._sized = False
        self._sink, self._status, self._body = sink, 0, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        try:
            if self._transport is None:
                raise HttpError("connection broke", "before the request was sent")
            self._transport.write(message)
            await self._done
        finally:
            self._done = None
        return Response(self._status, bytes(self._body))

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received = time.perf_counter()
        self.answered = True
        if self._done is None:  # nobody asked for anything
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(HttpError("no HTTP", f"the answer is no HTTP/1.1: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self.reusable = None, False
        if self._status and not self._sized:
            self._finish()
        else:
            reason = getattr(exc, "strerror", None) or (str(exc) if exc else "closed by the server")
            self._fail(HttpError("connection broke", reason))

    def on_header(self, name: bytes, value: bytes) -> None:
        del value
        self._sized = self._sized or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._sink is not None and self._status == 200:
            self._sink(body, self._received)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self.last_used = self._received
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: HttpError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
