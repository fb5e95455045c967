"""A client of any OpenAI-compatible server, as far as a chat needs one."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict

import httpx2
import msgspec

from server.terminal.http import ClientError, ErrorObject, HttpClient, decode, reported

_SILENT_SECONDS = 600.0  # a request may wait in the queue for long before it has a first token


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
    error: ErrorObject | str | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class ChatClient:
    """Talks to the server at `url`, given without `/v1`. Whatever goes wrong is a ClientError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._http = HttpClient(url, api_key, silent_seconds=_SILENT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.__exit__(kind, error, at)

    def first_model(self) -> str:
        """The id of the first model the server lists."""
        with self._http.ask("GET", "/v1/models") as response:
            models = decode(response.read(), _Models).data
        if not models:
            raise ClientError("the server lists no model: name one with --model")
        return models[0].id

    def stream(self, turns: Sequence[Turn], params: Mapping[str, object]) -> Generator[Piece]:
        """The answer to `turns` as it comes; `params` are further fields of the request.

        Closing the generator closes the connection, which tells the server to stop.
        """
        body = {"messages": turns, "stream": True, "stream_options": {"include_usage": True}, **params}
        # In ASCII, which can be written whatever the texts hold: half a surrogate pair is the server's to refuse.
        content, headers = json.dumps(body).encode("ascii"), {"Content-Type": "application/json"}
        whole = False
        with self._http.ask("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                piece = _piece(decode(event.data, _Chunk))
                whole = whole or piece.finish_reason is not None
                yield piece
        # Some servers never send [DONE].
        if not whole:
            raise ClientError("the answer broke off before its end")


def _piece(chunk: _Chunk) -> Piece:
    if chunk.error is not None:
        raise reported(chunk.error, "the server reports an error")
    choice = chunk.choices[0] if chunk.choices else _Choice()
    return Piece(
        text=(choice.delta.content or "") if choice.delta else "",
        finish_reason=choice.finish_reason,
        num_tokens=chunk.usage.completion_tokens if chunk.usage else None,
    )
