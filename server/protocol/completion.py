"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from server.errors import BadRequestError
from server.protocol import fields
from server.protocol.common import STREAMED, GenerationRequest, Usage
from server.protocol.fields import absent
from server.protocol.routing import RoutingTrace

DEFAULT_MAX_TOKENS = 16
_PROMPT = "The capital of France is"


class CompletionRequest(GenerationRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": _PROMPT}, STREAMED | {"prompt": _PROMPT}]})

    prompt: fields.Prompt = Field(description="A text, several, token ids, or several lists of them.")
    max_tokens: fields.TokenCount | None = absent(
        "With the prompt at most the context's length; 0 only with echo.", DEFAULT_MAX_TOKENS
    )
    best_of: fields.NumChoices | None = absent(
        "At least n: generate so many choices, return the n of the highest mean log probability. Over n not with "
        "stream. By default n."
    )
    logprobs: fields.NumLogprobs | None = absent("Return each token's log probability, and those of so many likeliest.")
    echo: fields.Flag | None = absent("Return the prompt in front of the answer.", False)

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequestError("max_tokens must be 1 or more; 0 only with echo.", param="max_tokens")
        if self.best_of is not None:
            if self.best_of < self.num_choices:
                raise BadRequestError(f"best_of must be at least n ({self.num_choices}).", param="best_of")
            if self.stream and self.best_of > self.num_choices:
                raise BadRequestError("best_of over n cannot be streamed.", param="best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The four forms of `prompt` as one: each item is a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    @property
    def num_generated(self) -> int:
        """Choices to generate a prompt; the best `num_choices` of them are returned."""
        return self.best_of or self.num_choices

    @property
    def token_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry a token. The first token of an echoed prompt has nothing before it: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: NotRequired[RoutingTrace]


class Completion(TypedDict):
    """The whole answer, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Annotated[Usage | None, Field(description="null in every chunk but the last")]]
