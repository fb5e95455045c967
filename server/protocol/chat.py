"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from server.errors import BadRequestError
from server.protocol import fields
from server.protocol.common import GenerationRequest, Usage
from server.protocol.routing import RoutingTrace


class Message(BaseModel):
    """One turn. Content is text, or parts of type text."""

    model_config = ConfigDict(strict=True)

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        fields.expect("one of system, developer, user, assistant, tool"),
    ]
    content: Any = None
    name: fields.Text | None = None
    tool_calls: Any = None
    tool_call_id: fields.Text | None = None

    def to_template(self, where: str) -> dict[str, Any]:
        """What the chat template sees: `developer` is `system`, and text parts are joined by line ends."""
        if self.tool_calls:
            raise BadRequestError(f"{where}.tool_calls is not supported by this server.", param="messages")
        message = {"role": "system" if self.role == "developer" else self.role, "content": self._text(where)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    def _text(self, where: str) -> str:
        if isinstance(self.content, str):
            return self.content
        if not isinstance(self.content, list):
            raise BadRequestError(f"{where}.content must be a string or a list of text parts.", param="messages")
        texts = []
        for index, part in enumerate(self.content):
            kind = part.get("type") if isinstance(part, dict) else None
            text = part.get("text") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(text, str):
                raise BadRequestError(
                    f'{where}.content[{index}] must be {{"type": "text", "text": "..."}}: this model reads only text.',
                    param="messages",
                )
            texts.append(text)
        return "\n".join(texts)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: fields.PositiveCount | None = None
    max_completion_tokens: fields.PositiveCount | None = None
    logprobs: fields.Flag | None = None
    top_logprobs: fields.NumLogprobs | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.tools:
            raise BadRequestError("tools is not supported by this server.", param="tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise BadRequestError("tool_choice must be none or auto when there are no tools.", param="tool_choice")
        return self

    @property
    def token_limit(self) -> int | None:
        """None: the rest of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def to_template(self) -> list[dict[str, Any]]:
        return [message.to_template(f"messages[{index}]") for index, message in enumerate(self.messages)]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    routing: NotRequired[RoutingTrace]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: NotRequired[RoutingTrace]


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
