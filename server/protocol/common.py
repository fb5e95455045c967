"""What completion and chat requests have in common."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from typing_extensions import TypedDict

from engine.grammar import GrammarSpec
from engine.types import SamplingParams, Steering
from server.config import SamplingDefaults
from server.errors import BadRequestError
from server.protocol import fields
from server.protocol.extras import check_extras
from server.protocol.fields import absent
from server.protocol.structured import ResponseFormat, StructuredOutputs, format_spec

T = TypeVar("T")

STREAMED: JsonDict = {"stream": True}
"""The second example of each request in the OpenAPI document."""

_NOT_BUILT = ("chat_template", "suffix")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: fields.Flag | None = absent("One more chunk, before the end, has the usage.", False)


class GenerationRequest(BaseModel):
    """Fields of both endpoints. `null` means absent; fields that nobody knows are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: fields.ModelId | None = absent("The served model's name.")
    temperature: fields.Temperature | None = absent("Under 1e-5 is greedy.", 1)
    top_p: fields.TopP | None = absent("Draw from the likeliest tokens that have this probability together.", 1)
    top_k: fields.TopK | None = absent("Draw from so many of the likeliest tokens; -1 or 0 is off.", 0)
    min_p: fields.MinP | None = absent("Draw from tokens with this share of the likeliest one's probability.", 0)
    presence_penalty: fields.Penalty | None = absent("Off the logit of each token that the answer has.", 0)
    frequency_penalty: fields.Penalty | None = absent("The same, for each time that the answer has it.", 0)
    repetition_penalty: fields.RepetitionPenalty | None = absent(
        "Divides positive logits, and multiplies negative ones, of tokens that prompt or answer have.", 1
    )
    n: fields.NumChoices | None = absent("Choices a prompt; prompts times n are at most 128 too.", 1)
    logit_bias: fields.LogitBias | None = absent("Added to the logits of tokens, by their ids written as strings.")
    stop: fields.Stop | None = absent("Text that ends the answer; it is left out of it.")
    stop_token_ids: fields.StopTokenIds | None = absent("Tokens that end the answer.")
    ignore_eos: fields.Flag | None = absent("Go on after an end-of-sequence token.", False)
    min_tokens: fields.TokenCount | None = absent("No end before so many; at most max_tokens.", 0)
    include_stop_str_in_output: fields.Flag | None = absent("Leave the stop string in.", False)
    skip_special_tokens: fields.Flag | None = absent("Leave control tokens out of the text.", True)
    seed: fields.Seed | None = absent("Without one the server takes a new one for each request.")
    stream: fields.Flag | None = absent("Answer with server-sent events.", False)
    stream_options: StreamOptions | None = absent("Needs stream.")
    priority: fields.Priority | None = absent("Lower goes first.", 0)
    cache_salt: fields.CacheSalt | None = absent("Only requests with the same one share cached prefixes.")
    routing: fields.Flag | None = absent("Return the experts of each output token.", False)
    routing_prompt: fields.Flag | None = absent("Return the experts of each prompt token.", False)
    experts_per_token: fields.ExpertCount | None = absent("Up to the number of experts; the model's own if absent.")
    expert_min_p: fields.MinP | None = absent("Leave out chosen experts of a lower probability.", 0)
    expert_mask: fields.ExpertMask | None = absent("Experts that may not be chosen, in all layers or by layer.")
    response_format: ResponseFormat | None = absent("What the answer must be; text may be anything.")
    structured_outputs: StructuredOutputs | None = absent("What the answer must match; not with response_format.")
    user: Any = absent("No effect.")
    metadata: Any = absent("No effect.")
    store: Any = absent("No effect.")
    service_tier: Any = absent("No effect.")

    @model_validator(mode="after")
    def _no_silent_loss(self) -> GenerationRequest:
        check_extras(self.model_extra, not_built=_NOT_BUILT)
        if self.structured_outputs is not None and format_spec(self.response_format) is not None:
            raise BadRequestError(
                "structured_outputs and response_format cannot both be given.", param="structured_outputs"
            )
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream to be true.", param="stream_options")
        return self

    @property
    def num_choices(self) -> int:
        """Choices to return a prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def steering(self) -> Steering | None:
        """What is asked of routing; None for nothing. One mask, however it is written, has one form."""
        mask = self.expert_mask or []
        layers: list[tuple[int | None, list[int]]]
        layers = [(None, mask)] if isinstance(mask, list) else [*sorted((int(key), ids) for key, ids in mask.items())]
        steering = Steering(
            experts_per_token=self.experts_per_token,
            forbidden=tuple((layer, tuple(sorted(set(experts)))) for layer, experts in layers if experts),
            min_p=self.expert_min_p or 0.0,
        )
        return None if steering == Steering() else steering

    @property
    def grammar_spec(self) -> GrammarSpec | None:
        """What the answer must match; None for nothing. Raises BadRequestError."""
        if self.structured_outputs is not None:
            return self.structured_outputs.to_spec()
        return format_spec(self.response_format)

    @property
    def grammar_param(self) -> str:
        """The field that `grammar_spec` comes from."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def to_params(
        self,
        defaults: SamplingDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's form of this request."""
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise BadRequestError(
                f"min_tokens must be at most max_tokens ({max_tokens}), not {min_tokens}.", param="min_tokens"
            )
        stop = self.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_or(self.temperature, defaults.temperature),
            top_p=_or(self.top_p, defaults.top_p),
            top_k=_or(self.top_k, defaults.top_k),
            min_p=_or(self.min_p, defaults.min_p),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=tuple((int(key), value) for key, value in (self.logit_bias or {}).items()),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
        )


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]
    active_params_per_token: NotRequired[Annotated[int, Field(description="of a request that steers its routing")]]


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
