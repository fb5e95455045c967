"""The limits of a connection, which end before there is a request or after its answer: headers and slow readers.

uvicorn's parser takes headers of any size at any pace, and a client may leave an answer unread for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.config import EdgeConfig
from server.edge.access_log import write_line
from server.edge.request_ids import request_id_of
from server.errors import ApiError

log = logging.getLogger(__name__)

_LINGER_SECONDS = 2.0
"""How long a refused client may go on sending. Closed at once, it could lose the answer while it still writes."""


class Connection(HttpToolsProtocol):
    """One connection, made by uvicorn, which gives the keyword arguments.

    - 431 when the head of a message (target, headers, trailers) is larger than `max_header_bytes`.
    - 408 when a head that has begun is not there within `header_seconds`. A connection on which nothing begins, or
      whose rest of a body nobody waits for any more, is closed after that time.
    - The connection is cut when a client reads nothing of an answer for `read_seconds`; its request ends with it.

    `count_rejected` is told the reason of each refusal.
    """

    def __init__(self, limits: EdgeConfig, count_rejected: Callable[[str], None], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._count_rejected = count_rejected
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._in_head = self._in_body = False
        self._began = 0.0
        self._head_bytes = 0
        """Of this message's head, as far as it is parsed."""
        self._silent_bytes = 0
        """Since the parser last delivered something: one long header is delivered only at its end."""
        self._delivered = False
        self._too_large = False
        self._refused = False

    # What uvicorn's protocol does, with an eye on sizes and times.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._stop_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._delivered = False
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._head_too_large() if self._too_large else ApiError(400, "This is not valid HTTP."))
            return
        self._silent_bytes = 0 if self._delivered else self._silent_bytes + len(data)
        if self._silent_bytes > self._limits.max_header_bytes:
            self._refuse(self._head_too_large())
        elif self._deadline is None and not self._answering:
            self._start_deadline()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._began = time.time()
        self._head_bytes = 0
        self._start_deadline()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(": \r\n"))
        if self._in_head:  # a trailer counts, but must not pass for a header: nobody has checked it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return  # `_parse` has it parsed again
        super().on_headers_complete()  # raises when the target is none
        self._in_head, self._in_body = False, True
        self._delivered = True
        self._stop_deadline()

    def on_body(self, body: bytes) -> None:
        self._delivered = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._delivered = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    # Heads.

    def _parse(self, data: bytes) -> None:
        """As if no client asked for an upgrade: there is none, so it must be ignored (RFC 9110, 7.8).

        The parser takes what follows such a head for another protocol. A new one reads the head again, without the
        header, and then the rest. Raises HttpParserError.
        """
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                line = b"%s %s HTTP/%s" % (
                    self.parser.get_method(),
                    self.url,
                    self.parser.get_http_version().encode(),
                )
                lines = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn makes it
                self.parser.feed_data(b"\r\n".join([line, *lines, b"", b""]))

    @property
    def _answering(self) -> bool:
        """Whether an answer is under way, or waits its turn."""
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.max_header_bytes:
            self._too_large = True
            raise ValueError("the head is too large")  # the parser stops

    def _head_too_large(self) -> ApiError:
        return ApiError(431, f"Target and headers may have up to {self._limits.max_header_bytes} bytes.")

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self._limits.header_seconds, self._too_late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._answering:
            self._start_deadline()  # the next request, half sent, must not cost the one before its answer
        elif self._in_head:
            seconds = self._limits.header_seconds
            self._refuse(ApiError(408, f"The headers did not arrive within {seconds:g} seconds."))
        else:
            self.transport.close()
            self._watch_closing()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request the app could see, and close. The first reason is the one that is told."""
        if self._refused:
            return
        self._refused = True
        self._stop_deadline()
        self._unset_keepalive_if_required()
        if self._in_body and not self.pipeline and not self.cycle.response_started:
            self.cycle.disconnected = True  # the app is told that the client has left
            self.cycle.message_event.set()
            self._answer(error, self.cycle.scope.get("state", {}).get("request_id"))
        elif self._in_body or self._answering or self.transport.is_closing():
            self.transport.close()  # an answer in the middle of another would be part of it
        else:
            request_id = self._answer(error, None)
            write_line(
                came=self._began or time.time(),
                request_id=request_id,
                method=None,
                path=None,
                status=error.status,
                seconds=max(0.0, time.time() - self._began) if self._began else 0.0,
                client=self.client,
                end="finished",
            )

    def _answer(self, error: ApiError, request_id: str | None) -> str:
        """The request's id, a new one unless it is given or among the headers."""
        self._count_rejected(error.code or "invalid_request")
        request_id = request_id or request_id_of(self.headers or ())
        response = error.response()
        response.headers["X-Request-Id"] = request_id
        response.headers["Connection"] = "close"
        lines = [b"%s: %s\r\n" % header for header in self.server_state.default_headers + response.raw_headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()
        return request_id

    # Readers.

    def _watch_closing(self) -> None:
        """A connection that is to close, but still has something to send, is not waited for for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size() and self._unread is None:
            self._start_unread()

    def _start_unread(self) -> None:
        self._stop_unread()
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._limits.read_seconds, self._check_unread)

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _check_unread(self) -> None:
        """A large answer may take a slow reader long: what counts is whether it reads at all."""
        if self.transport.get_write_buffer_size() < self._unread_bytes:
            self._start_unread()
            return
        self._unread = None
        log.info("a client read nothing for %g seconds; its connection is cut", self._limits.read_seconds)
        self.transport.abort()
