"""HTTP as the commands use it: one server, one key, and one line of words for whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
import msgspec

_CONNECT_SECONDS = 10.0
_MAX_ERROR_BYTES = 2**16

T = TypeVar("T")


class ClientError(Exception):
    """There is no answer, or only a part of one; the message is one line. `code` is the server's."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ErrorObject(msgspec.Struct):
    """What a server says is wrong."""

    message: str | None = None
    code: str | int | None = None


class _Refusal(msgspec.Struct):
    error: ErrorObject | str | None = None
    message: str | None = None  # where some servers put it


class HttpClient:
    """Talks to the server at `url`, given without `/v1`. Whatever goes wrong is a ClientError."""

    def __init__(self, url: str, api_key: str | None, *, silent_seconds: float) -> None:
        """`silent_seconds`: how long nothing may come of an answer."""
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ClientError("an API key has printable ASCII characters only, and no spaces")
        self._url = url
        self._silent_seconds = silent_seconds
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(silent_seconds, connect=_CONNECT_SECONDS),
            # Minutes may pass between two requests: a kept connection would often be found closed.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    @contextmanager
    def ask(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        """A successful answer, to be read within the block. Leaving it closes the connection."""
        try:
            with self._http.stream(method, f"{self._url}{path}", **request) as response:
                _check(response)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise ClientError(f"no server answers at {self._url}") from None
        except httpx2.ReadTimeout:
            raise ClientError(f"nothing came for {self._silent_seconds:.0f} seconds") from None
        except httpx2.InvalidURL:
            raise ClientError(f"{self._url} is no URL") from None
        except httpx2.HTTPError as error:
            raise ClientError(f"the connection broke: {_one_line(str(error))}") from None


def decode(content: bytes | str, kind: type[T]) -> T:
    """The `kind` that is written in `content`. Raises ClientError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError):
        raise ClientError("the server sent what no OpenAI-compatible server sends: is the URL right?") from None


def reported(error: ErrorObject | str, otherwise: str) -> ClientError:
    """The error that the server reports; in the words of `otherwise` where it has none."""
    if isinstance(error, str):
        return ClientError(_one_line(error))
    code = error.code if isinstance(error.code, str) else None
    return ClientError(_one_line(error.message or code or otherwise), code)


def _check(response: httpx2.Response) -> None:
    """Raises ClientError with the server's own words unless it answers with success."""
    if response.is_success:
        return
    status = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
    try:
        refusal = decode(_read_some(response), _Refusal)
    except ClientError:
        refusal = _Refusal()
    error = reported(refusal.error or refusal.message or status, status)
    words = str(error)
    if response.status_code == httpx2.codes.UNAUTHORIZED:
        words = f"the server wants another API key (--api-key, MIXSERVE_API_KEY): {words}"
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdigit():  # it may also be a date
        words = f"{words.rstrip('.')}; try again in {retry_after} s"
    raise ClientError(words, error.code)


def _read_some(response: httpx2.Response) -> bytes:
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > _MAX_ERROR_BYTES:
            break
    return content


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]
