"""One streamed answer, chunk by chunk: when its tokens came, and how many they were.

The times are those of `vllm bench serve`. TTFT: from the sending of the request to the first chunk with a token. ITL:
between two such chunks. End-to-end: to the last one. TPOT: (end-to-end - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from server.bench.events import EventReader

MAX_MESSAGE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A request that was served. Times in seconds."""

    ttft: float
    itls: list[float]
    latency: float
    """End-to-end."""
    output_tokens: int
    input_tokens: int | None
    """None where the server does not count them."""
    cached_tokens: int = 0
    """Input tokens that the server had in its prefix cache, where it says so."""
    counted: bool = True
    """Whether the server has counted the output tokens; else each chunk is taken for one."""

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not served, or not to its end."""

    kind: str
    """What the errors are counted by, like `HTTP 503`."""
    message: str


Outcome = Answer | Failure


class _Error(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    role: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None
    message: str | None = None  # where some servers put it, and
    detail: Any = None  # where FastAPI does


_CHUNKS = msgspec.json.Decoder(_Chunk)


class AnswerReader:
    """Reads the body of one streamed answer to a request that was sent at `start`."""

    def __init__(self, start: float) -> None:
        self._start = self._last = start
        self._events = EventReader()
        self._ttft: float | None = None
        self._itls: list[float] = []
        self._usage = _Usage()
        self._ended = False
        self._failure: Failure | None = None

    def feed(self, part: bytes, now: float) -> None:
        """Take the next part of the body, which came at `now`."""
        for data in self._events.feed(part):
            if data == b"[DONE]":
                self._ended = True
                continue
            try:
                chunk = _CHUNKS.decode(data)
            except (ValueError, RecursionError) as error:
                self._failure = Failure("bad chunk", one_line(str(error)))
                continue
            if chunk.error is not None:
                self._failure = Failure("error in stream", _words(chunk.error, "no reason given"))
            self._usage = chunk.usage or self._usage
            if chunk.choices:
                self._take(chunk.choices[0], now)

    def outcome(self) -> Outcome:
        """What became of the request, once its body has ended."""
        if self._failure is not None:
            return self._failure
        if not self._ended:
            return Failure("broken off", "the answer ended before its last chunk")
        if self._ttft is None:
            return Failure("no tokens", "the answer has no token")
        usage = self._usage
        details = usage.prompt_tokens_details or _Details()
        counted = usage.completion_tokens is not None
        return Answer(
            ttft=self._ttft,
            itls=self._itls,
            latency=self._last - self._start,
            output_tokens=usage.completion_tokens if usage.completion_tokens is not None else 1 + len(self._itls),
            input_tokens=usage.prompt_tokens,
            cached_tokens=details.cached_tokens or 0,
            counted=counted,
        )

    def _take(self, choice: _Choice, now: float) -> None:
        delta = choice.delta or _Delta()
        is_last = choice.finish_reason is not None
        self._ended = self._ended or is_last
        text = choice.text or delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls
        if not text and not is_last and delta.role is not None:
            return  # the first chunk of a chat may name the role alone
        # A chunk without text is a token whose characters are not whole yet; at the end it is only the end.
        if self._ttft is None:
            self._ttft = now - self._start
        elif text or not is_last:
            self._itls.append(now - self._last)
        self._last = now


def refusal(status: int, body: bytes) -> Failure:
    """What an answer with another status than 200 says."""
    try:
        said = msgspec.json.decode(body, type=_Refusal)
    except (ValueError, RecursionError):
        text = body[:MAX_MESSAGE].decode(errors="replace")
        said = _Refusal(message="" if text.lstrip()[:1] in ("<", "{", "[") else text)
    return Failure(f"HTTP {status}", _words(said.error or said.message or str(said.detail or ""), "no reason given"))


def one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE]


def _words(error: _Error | str, otherwise: str) -> str:
    words = error if isinstance(error, str) else error.message or str(error.code or "")
    return one_line(words) or otherwise
