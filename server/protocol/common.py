"""What completion and chat requests have in common."""

from __future__ import annotations

import logging
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from engine.types import SamplingParams, Steering
from server.config import SamplingDefaults
from server.errors import BadRequestError
from server.protocol import fields

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_BUILT = ("chat_template", "structured_outputs", "suffix")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: fields.Flag | None = None


class GenerationRequest(BaseModel):
    """Fields of both endpoints. `null` means absent; fields that nobody knows are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: fields.Text | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.TopP | None = None
    top_k: fields.TopK | None = None
    min_p: fields.MinP | None = None
    presence_penalty: fields.Penalty | None = None
    frequency_penalty: fields.Penalty | None = None
    repetition_penalty: fields.RepetitionPenalty | None = None
    n: fields.NumChoices | None = None
    logit_bias: fields.LogitBias | None = None
    stop: fields.Stop | None = None
    stop_token_ids: fields.StopTokenIds | None = None
    ignore_eos: fields.Flag | None = None
    min_tokens: fields.TokenCount | None = None
    include_stop_str_in_output: fields.Flag | None = None
    skip_special_tokens: fields.Flag | None = None
    seed: fields.Seed | None = None
    stream: fields.Flag | None = None
    stream_options: StreamOptions | None = None
    priority: fields.Priority | None = None
    cache_salt: fields.CacheSalt | None = None
    routing: fields.Flag | None = None
    routing_prompt: fields.Flag | None = None
    experts_per_token: fields.ExpertCount | None = None
    expert_min_p: fields.MinP | None = None
    expert_mask: fields.ExpertMask | None = None
    response_format: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _no_silent_loss(self) -> GenerationRequest:
        """A documented field that is not built yet is refused; an unknown one is ignored, and the log can tell."""
        extra = {name for name, value in (self.model_extra or {}).items() if value is not None}
        for name in _NOT_BUILT:
            if name in extra:
                raise BadRequestError(f"{name} is not supported by this server.", param=name)
        if self.response_format is not None and self.response_format != {"type": "text"}:
            raise BadRequestError('response_format must be {"type": "text"}.', param="response_format")
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream to be true.", param="stream_options")
        if unknown := sorted(extra):
            log.debug("ignored unknown fields: %r", [name[:50] for name in unknown[:20]])
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
