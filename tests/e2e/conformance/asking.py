"""One way to ask for an answer, whole or streamed, and one form of what came back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types.chat import ChatCompletionTokenLogprob

MODEL = "tiny"
END = 257
"""An end-of-sequence id of the tiny model."""


@dataclass
class Choice:
    """Of either endpoint. In a stream, the pieces put together."""

    text: str = ""
    pieces: list[str] = field(default_factory=list)
    """The text of each chunk that has some; of a whole answer, one."""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    entries: list[ChatCompletionTokenLogprob] = field(default_factory=list)
    """Log probabilities of a chat."""
    has_logprobs: bool = False
    role: str | None = None
    content_is_null: bool = False
    calls: list[ToolCall] = field(default_factory=list)


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    choices: list[Choice]
    usage: openai.types.CompletionUsage

    @property
    def only(self) -> Choice:
        (choice,) = self.choices
        return choice

    @property
    def num_cached(self) -> int:
        details = self.usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0


@dataclass(frozen=True)
class Ask:
    client: openai.OpenAI
    stream: bool

    def complete(self, *, extra: dict[str, Any] | None = None, **body: Any) -> Answer:
        """POST /v1/completions. `extra` has what OpenAI does not know."""
        asked: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "extra_body": extra} | body
        if not self.stream:
            whole = self.client.completions.create(**asked)
            assert whole.usage is not None
            choices = [Choice() for _ in whole.choices]
            for choice in whole.choices:
                _add_text(choices[choice.index], choice)
            return Answer(choices, whole.usage)
        return _read_stream(self.client.completions.create(**asked, **STREAMED), _add_text)

    def chat(self, content: str = "Hi", *, extra: dict[str, Any] | None = None, **body: Any) -> Answer:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": content}]
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "extra_body": extra} | body
        if "max_tokens" not in asked:
            asked.setdefault("max_completion_tokens", 200)
        if not self.stream:
            whole = self.client.chat.completions.create(**asked)
            choices = [Choice() for _ in whole.choices]
            for choice in whole.choices:
                _add_message(choices[choice.index], choice)
            assert whole.usage is not None
            return Answer(choices, whole.usage)
        return _read_stream(self.client.chat.completions.create(**asked, **STREAMED), _add_delta)


STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _read_stream(chunks: Iterable[Any], add: Any) -> Answer:
    choices: dict[int, Choice] = {}
    usage = None
    for chunk in chunks:
        assert usage is None, "a chunk after the usage"
        usage = chunk.usage
        for choice in chunk.choices:
            add(choices.setdefault(choice.index, Choice()), choice)
    assert usage is not None
    return Answer([choices[index] for index in range(len(choices))], usage)


def _add_piece(choice: Choice, text: str | None) -> None:
    if text:
        choice.text += text
        choice.pieces.append(text)


def _finish(choice: Choice, reason: str | None) -> None:
    assert choice.finish_reason is None, "a chunk after the finish_reason"
    choice.finish_reason = reason


def _add_text(choice: Choice, piece: Any) -> None:
    _add_piece(choice, piece.text)
    _finish(choice, piece.finish_reason)
    if piece.logprobs is not None:
        choice.has_logprobs = True
        choice.tokens += piece.logprobs.tokens
        choice.token_logprobs += piece.logprobs.token_logprobs
        choice.top_logprobs += piece.logprobs.top_logprobs
        choice.text_offset += piece.logprobs.text_offset


def _add_scores(choice: Choice, piece: Any) -> None:
    _finish(choice, piece.finish_reason)
    if piece.logprobs is not None:
        choice.has_logprobs = True
        choice.entries += piece.logprobs.content


def _add_message(choice: Choice, piece: Any) -> None:
    message = piece.message
    choice.role = message.role
    choice.content_is_null = message.content is None
    choice.calls = [ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    _add_piece(choice, message.content)
    _add_scores(choice, piece)


def _add_delta(choice: Choice, piece: Any) -> None:
    delta = piece.delta
    choice.role = choice.role or delta.role
    _add_piece(choice, delta.content)
    for call in delta.tool_calls or ():
        if call.index == len(choice.calls):
            choice.calls.append(ToolCall(call.id, call.function.name))
        choice.calls[call.index].arguments += call.function.arguments or ""
    choice.content_is_null = bool(choice.calls) and not choice.text
    _add_scores(choice, piece)


def forced(*texts: str) -> dict[str, Any]:
    """`extra` that makes the model say one of `texts` and end."""
    return {"structured_outputs": {"choice": list(texts)}}
