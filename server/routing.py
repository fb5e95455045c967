"""Routing in the answers of completions and chats: traces, and what a steered token cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.types import EngineInfo, ExpertVisits, Request, Steering, TokenRouting
from engine.validate_routing import most_traced_tokens, traced_tokens
from server.errors import BadRequestError
from server.protocol.routing import RoutingTrace, TokenTrace

_SCALE = 10_000
"""Four decimals. int(x * scale + 0.5) / scale is several times faster than round(x, 4), and equal for x >= 0."""


def token_trace(routing: TokenRouting) -> TokenTrace:
    """The JSON form of one token's routing."""
    return {
        "experts": [list(layer) for layer in routing.expert_ids],
        "weights": [[int(weight * _SCALE + 0.5) / _SCALE for weight in layer] for layer in routing.weights],
        "entropy": [int(entropy * _SCALE + 0.5) / _SCALE for entropy in routing.entropy],
    }


def trace(*, prompt: Iterable[TokenTrace] | None, tokens: Iterable[TokenTrace] | None) -> RoutingTrace:
    """The lists under their names; one that is None is left out."""
    result: RoutingTrace = {}
    if prompt is not None:
        result["prompt"] = list(prompt)
    if tokens is not None:
        result["tokens"] = list(tokens)
    return result


def check_trace_size(requests: Sequence[Request], info: EngineInfo) -> None:
    """Raise unless the traces of all choices together stay under the limit of one. The requests differ in their prompts
    alone.
    """
    total, most = sum(traced_tokens(request, info) for request in requests), most_traced_tokens(requests[0], info)
    if total > most:
        field = "routing" if requests[0].trace_routing else "routing_prompt"
        raise BadRequestError(
            f"{field}: traces of {total} tokens in all choices are over this model's limit of {most}; lower n or "
            "max_tokens, or leave the prompt out.",
            param=field,
        )


def active_params_per_token(info: EngineInfo, steering: Steering, visits: Sequence[ExpertVisits]) -> int:
    """Parameters that worked for a computed token of a steered request, on average.

    With A = shared + K * P active parameters in the model, P those of one expert over all L layers: one expert that
    computes one token in one layer is a visit and adds P / L. Without any record of visits, the K that was asked for
    counts, as if min-p had dropped nothing.
    """
    shared = info.active_params - info.num_experts_per_tok * info.expert_params
    num_tokens = sum(item.num_tokens for item in visits)
    if num_tokens:
        experts = sum(item.num_visits for item in visits) / num_tokens / info.num_layers
    else:
        experts = steering.experts_per_token or info.num_experts_per_tok
    return shared + round(experts * info.expert_params)
