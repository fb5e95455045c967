"""A client of any OpenAI-compatible server, as far as a chat needs one."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict, TypeVar

import httpx2
import msgspec

_CONNECT_SECONDS = 10.0
_SILENT_SECONDS = 600.0  # a request may wait in the queue for long before it has a first token
_MAX_ERROR_BYTES = 2**16

T = TypeVar("T")


class ChatError(Exception):
    """There is no answer, or only a part of one; the message is one line. `code` is the server's."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Turn(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What one chunk of a stream brings."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    """Of the whole answer; in one chunk at the end, where the server counts them."""


class _Error(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None
    message: str | None = None  # where some servers put it


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class ChatClient:
    """Talks to the server at `url`, given without `/v1`. Whatever goes wrong is a ChatError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ChatError("an API key has printable ASCII characters only, and no spaces")
        self._url = url
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS),
            # Minutes pass between two messages: a kept connection would often be found closed.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The id of the first model the server lists."""
        with self._errors(), self._http.stream("GET", f"{self._url}/v1/models") as response:
            _check(response)
            models = _decode(response.read(), _Models).data
        if not models:
            raise ChatError("the server lists no model: name one with --model")
        return models[0].id

    def stream(self, turns: Sequence[Turn], params: Mapping[str, object]) -> Generator[Piece]:
        """The answer to `turns` as it comes; `params` are further fields of the request.

        Closing the generator closes the connection, which tells the server to stop.
        """
        url = f"{self._url}/v1/chat/completions"
        body = {"messages": turns, "stream": True, "stream_options": {"include_usage": True}, **params}
        # In ASCII, which can be written whatever the texts hold: half a surrogate pair is the server's to refuse.
        content, headers = json.dumps(body).encode("ascii"), {"Content-Type": "application/json"}
        whole = False
        with self._errors(), self._http.stream("POST", url, content=content, headers=headers) as response:
            _check(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                piece = _piece(_decode(event.data, _Chunk))
                whole = whole or piece.finish_reason is not None
                yield piece
        # Some servers never send [DONE].
        if not whole:
            raise ChatError("the answer broke off before its end")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong on the way is a ChatError."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise ChatError(f"no server answers at {self._url}") from None
        except httpx2.ReadTimeout:
            raise ChatError(f"nothing came for {_SILENT_SECONDS:.0f} seconds") from None
        except httpx2.InvalidURL:
            raise ChatError(f"{self._url} is no URL") from None
        except httpx2.HTTPError as error:
            raise ChatError(f"the connection broke: {_one_line(str(error))}") from None


def _piece(chunk: _Chunk) -> Piece:
    if chunk.error is not None:
        raise _chat_error(chunk.error, "the server reports an error")
    choice = chunk.choices[0] if chunk.choices else _Choice()
    return Piece(
        text=(choice.delta.content or "") if choice.delta else "",
        finish_reason=choice.finish_reason,
        num_tokens=chunk.usage.completion_tokens if chunk.usage else None,
    )


def _check(response: httpx2.Response) -> None:
    """Raises ChatError with the server's own words unless it answers with success."""
    if response.is_success:
        return
    status = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
    try:
        refusal = _decode(_read_some(response), _Refusal)
    except ChatError:
        refusal = _Refusal()
    error = _chat_error(refusal.error or refusal.message or status, status)
    words = str(error)
    if response.status_code == httpx2.codes.UNAUTHORIZED:
        words = f"the server wants another API key (--api-key, MIXSERVE_API_KEY): {words}"
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdigit():  # it may also be a date
        words = f"{words.rstrip('.')}; try again in {retry_after} s"
    raise ChatError(words, error.code)


def _read_some(response: httpx2.Response) -> bytes:
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > _MAX_ERROR_BYTES:
            break
    return content


def _chat_error(error: _Error | str, otherwise: str) -> ChatError:
    if isinstance(error, str):
        return ChatError(_one_line(error))
    code = error.code if isinstance(error.code, str) else None
    return ChatError(_one_line(error.message or code or otherwise), code)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _decode(content: bytes | str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError):
        raise ChatError("the server sent what no OpenAI-compatible server sends: is the URL right?") from None
