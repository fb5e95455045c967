"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue
from typing_extensions import TypedDict

from server.errors import BadRequestError
from server.protocol import fields
from server.protocol.chat import Messages
from server.protocol.extras import check_extras
from server.protocol.fields import absent
from server.protocol.tools import Tools, check_tools

_ABSENT: JsonDict = {"type": "null"}
_OFF: JsonDict = {"enum": [False, None]}
_FORMS: list[JsonValue] = [
    {
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string"},
            "messages": _ABSENT,
            "tools": {"anyOf": [{"maxItems": 0}, _ABSENT]},
            "add_generation_prompt": _OFF,
        },
    },
    {
        "required": ["messages"],
        "properties": {"messages": {"type": "array"}, "prompt": _ABSENT, "add_special_tokens": _OFF},
    },
]
"""A text or a chat, each with what belongs to it."""


class TokenizeRequest(BaseModel):
    """Either a `prompt` or `messages`. `null` means absent; fields that nobody knows are ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        protected_namespaces=(),
        json_schema_extra={"oneOf": _FORMS, "examples": [{"prompt": "The capital of France is"}]},
    )

    model: fields.ModelId | None = absent("The served model's name.")
    prompt: fields.Text | None = absent("A text; may be empty.")
    add_special_tokens: fields.Flag | None = absent(
        "With `prompt`: put the tokenizer's beginning-of-sequence token in front. A chat has the template's own.", True
    )
    messages: Messages | None = absent("A conversation, encoded by the chat template.")
    add_generation_prompt: fields.Flag | None = absent("With `messages`: open the assistant's turn at the end.", True)
    tools: Tools | None = absent("With `messages`: functions that the model is told of.")
    return_token_strs: fields.Flag | None = absent("Return each token as the vocabulary writes it.", False)

    @model_validator(mode="after")
    def _fits_together(self) -> TokenizeRequest:
        check_extras(self.model_extra, not_built=("chat_template",))
        if self.messages is not None:
            if self.prompt is not None:
                raise BadRequestError("prompt and messages exclude each other.", param="messages")
            if self.add_special_tokens:
                raise BadRequestError("add_special_tokens needs prompt.", param="add_special_tokens")
        elif self.prompt is None:
            raise BadRequestError("prompt or messages is required.", param="prompt")
        else:
            for name in ("add_generation_prompt", "tools"):
                if getattr(self, name):
                    raise BadRequestError(f"{name} needs messages.", param=name)
        check_tools(self.tools or [], None)
        return self


class DetokenizeRequest(BaseModel):
    """`null` means absent; fields that nobody knows are ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        protected_namespaces=(),
        json_schema_extra={"examples": [{"tokens": [1, 415, 5565]}]},
    )

    model: fields.ModelId | None = absent("The served model's name.")
    tokens: fields.AnyTokenIds = Field(description="Token ids of the vocabulary; may be none.")

    @model_validator(mode="after")
    def _no_silent_loss(self) -> DetokenizeRequest:
        check_extras(self.model_extra)
        return self


class Tokenized(TypedDict):
    count: int
    max_model_len: Annotated[int, Field(description="Longest sequence, in tokens.")]
    tokens: list[int]
    token_strs: Annotated[list[str] | None, Field(description="Parallel to `tokens`; null unless asked for.")]


class Detokenized(TypedDict):
    prompt: Annotated[str, Field(description="The text, control tokens and all.")]
