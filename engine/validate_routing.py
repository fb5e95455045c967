"""What a request may ask of routing: steering that leaves every layer an expert, and traces of bounded size."""

from __future__ import annotations

import math

from engine.errors import InvalidRequestError
from engine.types import EngineInfo, Request, Steering

MAX_TRACED_PLACES = 1_000_000
"""Tokens * layers * experts a token that one request's trace may hold: some 15 MB of JSON."""


def check_routing(request: Request, info: EngineInfo) -> None:
    """Raise InvalidRequestError, naming the field of the HTTP contract, unless the engine can route `request` so."""
    if request.steering is not None:
        _check_steering(request.steering, info)
    for name, asked in (("routing", request.trace_routing), ("routing_prompt", request.trace_prompt_routing)):
        if type(asked) is not bool:
            raise InvalidRequestError(f"{name} must be true or false, not {asked!r}", param=name)
    if not (request.trace_routing or request.trace_prompt_routing):
        return
    field = "routing" if request.trace_routing else "routing_prompt"
    if not info.record_routing:
        raise InvalidRequestError(f"{field}: this server does not record routing (--no-record-routing)", param=field)
    num_tokens, most = traced_tokens(request, info), most_traced_tokens(request, info)
    if num_tokens > most:
        raise InvalidRequestError(
            f"{field}: a trace of {num_tokens} tokens is over this model's limit of {most}; lower max_tokens or leave "
            f"the prompt out",
            param=field,
        )


def traced_tokens(request: Request, info: EngineInfo) -> int:
    """The most tokens that the trace of `request` may have."""
    num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
    num_new = info.max_model_len - num_prompt if max_tokens is None else max_tokens
    return num_new * request.trace_routing + num_prompt * request.trace_prompt_routing


def most_traced_tokens(request: Request, info: EngineInfo) -> int:
    """The most that it could have, with what it asks of routing."""
    top_k = (request.steering and request.steering.experts_per_token) or info.num_experts_per_tok
    return MAX_TRACED_PLACES // (info.num_layers * top_k)


def _check_steering(steering: Steering, info: EngineInfo) -> None:
    top_k = steering.experts_per_token
    if top_k is not None and not (type(top_k) is int and 1 <= top_k <= info.max_experts_per_tok):
        raise InvalidRequestError(
            f"experts_per_token must be an integer from 1 to {info.max_experts_per_tok}, not {top_k!r}",
            param="experts_per_token",
        )
    min_p = steering.min_p
    if type(min_p) not in (int, float) or not math.isfinite(min_p) or not 0 <= min_p <= 1:
        raise InvalidRequestError(f"expert_min_p must be a number from 0 to 1, not {min_p!r}", param="expert_min_p")
    _check_mask(steering, info)


def _check_mask(steering: Steering, info: EngineInfo) -> None:
    most = (info.num_layers + 1) * info.num_experts
    if sum(len(experts) for _, experts in steering.forbidden) > most:
        raise InvalidRequestError(f"expert_mask may name up to {most} experts in all", param="expert_mask")
    left = [set(range(info.num_experts)) for _ in range(info.num_layers)]
    for layer, experts in steering.forbidden:
        if layer is not None and not (type(layer) is int and 0 <= layer < info.num_layers):
            raise InvalidRequestError(
                f"expert_mask names layer {layer!r}; the model has layers 0 to {info.num_layers - 1}",
                param="expert_mask",
            )
        for expert in experts:
            if type(expert) is not int or not 0 <= expert < info.num_experts:
                raise InvalidRequestError(
                    f"expert_mask names expert {expert!r}; the model has experts 0 to {info.num_experts - 1}",
                    param="expert_mask",
                )
        for allowed in left if layer is None else [left[layer]]:
            allowed.difference_update(experts)
    for layer, allowed in enumerate(left):
        if not allowed:
            raise InvalidRequestError(
                f"expert_mask forbids every expert of layer {layer}; at least one must be allowed", param="expert_mask"
            )
