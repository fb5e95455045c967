"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonValue
from typing_extensions import TypedDict

from server.errors import BadRequestError
from server.protocol import fields
from server.protocol.common import STREAMED, GenerationRequest, Usage
from server.protocol.fields import absent
from server.protocol.routing import RoutingTrace
from server.protocol.tools import GivenCalls, NamedTool, ToolCall, ToolCallDelta, ToolChoice, Tools, check_tools

_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
_QUESTION: JsonValue = [{"role": "user", "content": "What is the capital of France?"}]
MAX_MESSAGES = 16_384
_NoLonger = Annotated[None, fields.expect("absent: this server knows tools and tool_calls in its place")]


class Message(BaseModel):
    """One turn. Content is text, or parts of type text, and null only beside tool_calls."""

    model_config = ConfigDict(strict=True)

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        fields.expect("one of system, developer, user, assistant, tool"),
    ]
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = absent("Text, or parts of it; null only beside tool_calls.")
    name: fields.Text | None = absent("For the chat template.")
    tool_calls: GivenCalls | None = absent("Of an assistant's message.")
    tool_call_id: fields.Text | None = absent("Of a tool's message: the call that it answers.")
    function_call: _NoLonger = absent("Not supported: see tool_calls.")

    def to_template(self, where: str) -> dict[str, Any]:
        """What the chat template sees: `developer` is `system`, and text parts are joined by line ends."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = "" if self.tool_calls and self.content is None else self._text(where)
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            if self.role != "assistant":
                raise BadRequestError(f"{where}.tool_calls needs the role assistant.", param="messages")
            message["tool_calls"] = [
                call.to_template(f"{where}.tool_calls[{index}]") for index, call in enumerate(self.tool_calls)
            ]
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


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), fields.at_most(MAX_MESSAGES)
]


class ChatRequest(GenerationRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": _QUESTION},
                STREAMED | {"messages": _QUESTION, "logprobs": True, "top_logprobs": 3},
            ]
        }
    )

    messages: Messages = Field(description="The conversation so far.")
    max_tokens: fields.PositiveCount | None = absent("Without one, as many as the context has room for.")
    max_completion_tokens: fields.PositiveCount | None = absent("Goes before max_tokens.")
    logprobs: fields.Flag | None = absent("Return each token's log probability.", False)
    top_logprobs: fields.NumLogprobs | None = absent("And those of so many likeliest; needs logprobs.")
    tools: Tools | None = absent("Functions that the model may call.")
    tool_choice: ToolChoice | None = absent(
        "none: the model is told of no tools; auto: it may call them; required: it must; or the one that it must call. "
        "By default auto, and none without tools."
    )
    parallel_tool_calls: fields.Flag | None = absent("false: at most one call.", True)
    functions: _NoLonger = absent("Not supported: see tools.")
    function_call: _NoLonger = absent("Not supported: see tool_choice.")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        check_tools(self.tools or [], self.tool_choice)
        if self.offered_tools and self.structured_outputs is not None:
            raise BadRequestError(
                "structured_outputs cannot be given together with tools; response_format can.",
                param="structured_outputs",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """None: the rest of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> Tools:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def demanded_tools(self) -> Tools:
        """Those of which one must be called; none where the model is free."""
        match self.tool_choice:
            case "required":
                return self.offered_tools
            case NamedTool(function=chosen):
                return [tool for tool in self.offered_tools if tool.function.name == chosen.name]
        return []

    @property
    def may_call_several(self) -> bool:
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    def to_template(self) -> list[dict[str, Any]]:
        return messages_to_template(self.messages)


def messages_to_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What the chat template sees. An answer to a call is told the function's name.

    Raises BadRequestError for content, calls and answers that are out of order.
    """
    found = []
    called: dict[str, str] = {}  # the calls that may be answered, by id
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        converted = message.to_template(where)
        if message.role == "tool":
            if message.tool_call_id is None:
                raise BadRequestError(f"{where}.tool_call_id is required for the role tool.", param="messages")
            if message.tool_call_id not in called:
                raise BadRequestError(
                    f"{where}.tool_call_id must be the id of one of the tool_calls right before it.", param="messages"
                )
            converted.setdefault("name", called[message.tool_call_id])
        else:
            called = {call.id: call.function.name for call in message.tool_calls or ()}
        found.append(converted)
    return found


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
    content: Annotated[str | None, Field(description="null when there are only calls")]
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
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
    content: str | None
    tool_calls: list[ToolCallDelta]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    routing: NotRequired[RoutingTrace]


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
