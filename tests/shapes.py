"""The allowed keys and types of every response: OpenAI's API reference, and what mixserve documents beside it.

The official client validates nothing and allows extra keys, and its models are stricter than the API in two places (a
null `finish_reason` in the chunks of a completion, a null first log probability of an echoed prompt). So this file is
the measure: tests/shape_checks.py reads it, tests/checked_responses.py holds every response of every test against it.

A shape is plain data:

- a type: `str`, `int`, `bool`, `None`; `float` is any finite number
- `{"key": shape, "other?": shape}`: an object with these keys and no others; `?` marks one that may be absent
- `[shape]`: a list of such items
- `(shape, shape)`: one of these
- `{"a", "b"}`: one of these strings
- `{str: shape}`: an object with any keys
- a function: True for what is allowed
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Shape = Any


def natural(value: Any) -> bool:
    """A count or a place in a list."""
    return type(value) is int and value >= 0


def timestamp(value: Any) -> bool:
    """Whole seconds since 1970, in this century."""
    return type(value) is int and 1_500_000_000 < value < 4_000_000_000


def filled(value: Any) -> bool:
    """A string with something in it."""
    return isinstance(value, str) and value != ""


def logprob(value: Any) -> bool:
    return type(value) in (int, float) and -9999 <= value <= 0


def byte(value: Any) -> bool:
    return natural(value) and value < 256


def matching(pattern: str) -> Callable[[Any], bool]:
    """A string that is `pattern` from end to end."""

    def test(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    test.__name__ = f"matching {pattern}"
    return test


def anything(_: Any) -> bool:
    return True


# Errors: a whole answer, or the last event of a stream.
ERROR_CODES = {
    "invalid_api_key": {401},
    "model_not_found": {404},
    "context_length_exceeded": {400},
    "server_overloaded": {503},
    "rate_limit_exceeded": {429},
    "engine_dead": {500, 503},
}
"""Each with the statuses it comes with."""
ERROR: Shape = {
    "error": {
        "message": filled,
        "type": {"invalid_request_error", "rate_limit_error", "server_error"},
        "param": (filled, None),
        "code": ({*ERROR_CODES}, None),
    }
}

# What all generated answers have.
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
USAGE: Shape = {
    "prompt_tokens": natural,
    "completion_tokens": natural,
    "total_tokens": natural,
    "prompt_tokens_details?": {"cached_tokens": natural},
    "active_params_per_token?": natural,
}
TOKEN_ROUTING: Shape = {"experts": [[natural]], "weights": [[float]], "entropy": [float]}
ROUTING: Shape = {"prompt?": [TOKEN_ROUTING], "tokens?": [TOKEN_ROUTING]}

# POST /v1/completions.
COMPLETION_LOGPROBS: Shape = {
    "tokens": [str],
    "token_logprobs": [(logprob, None)],
    "top_logprobs": [({str: logprob}, None)],
    "text_offset": [natural],
}
COMPLETION_HEAD: Shape = {
    "id": matching("cmpl-.+"),
    "object": {"text_completion"},
    "created": timestamp,
    "model": filled,
}
COMPLETION_CHOICE: Shape = {
    "index": natural,
    "text": str,
    "logprobs": (COMPLETION_LOGPROBS, None),
    "finish_reason": FINISH_REASONS - {"tool_calls"},
    "routing?": ROUTING,
}
COMPLETION: Shape = {**COMPLETION_HEAD, "choices": [COMPLETION_CHOICE], "usage": USAGE}
COMPLETION_CHUNK_CHOICE: Shape = {**COMPLETION_CHOICE, "finish_reason": (FINISH_REASONS - {"tool_calls"}, None)}
COMPLETION_CHUNK: Shape = {**COMPLETION_HEAD, "choices": [COMPLETION_CHUNK_CHOICE], "usage?": (USAGE, None)}

# POST /v1/chat/completions.
TOP_LOGPROB: Shape = {"token": str, "logprob": logprob, "bytes": ([byte], None)}
CHAT_LOGPROBS: Shape = {"content": [{**TOP_LOGPROB, "top_logprobs": [TOP_LOGPROB]}], "refusal": None}
TOOL_CALL: Shape = {"id": filled, "type": {"function"}, "function": {"name": filled, "arguments": str}}
TOOL_CALL_DELTA: Shape = {
    "index": natural,
    "id?": filled,
    "type?": {"function"},
    "function": {"name?": filled, "arguments?": str},
}
MESSAGE: Shape = {"role": {"assistant"}, "content": (str, None), "refusal": None, "tool_calls?": [TOOL_CALL]}
DELTA: Shape = {"role?": {"assistant"}, "content?": (str, None), "tool_calls?": [TOOL_CALL_DELTA]}
CHAT_CHOICE: Shape = {
    "index": natural,
    "message": MESSAGE,
    "logprobs": (CHAT_LOGPROBS, None),
    "finish_reason": FINISH_REASONS,
    "routing?": ROUTING,
}
CHAT_CHUNK_CHOICE: Shape = {
    "index": natural,
    "delta": DELTA,
    "logprobs": (CHAT_LOGPROBS, None),
    "finish_reason": (FINISH_REASONS, None),
    "routing?": ROUTING,
}
CHAT_HEAD: Shape = {
    "id": matching("chatcmpl-.+"),
    "created": timestamp,
    "model": filled,
}
CHAT_COMPLETION: Shape = {**CHAT_HEAD, "object": {"chat.completion"}, "choices": [CHAT_CHOICE], "usage": USAGE}
CHAT_CHUNK: Shape = {
    **CHAT_HEAD,
    "object": {"chat.completion.chunk"},
    "choices": [CHAT_CHUNK_CHOICE],
    "usage?": (USAGE, None),
}

# All else.
MODEL: Shape = {
    "id": filled,
    "object": {"model"},
    "created": timestamp,
    "owned_by": filled,
    "max_model_len": natural,
    "routing_simulation?": {"even", "zipf", "one"},
}
LAYER_ROUTING: Shape = {
    "assigned": [natural],
    "dispatched": [natural],
    "dropped": natural,
    "max_over_mean": float,
    "coefficient_of_variation": float,
    "entropy": float,
    "entropy_share": float,
    "auxiliary_loss": float,
    "mean_probability": [float],
    "effective_batch": float,
    "distinct_experts": float,
}
ROUTING_STATS: Shape = {
    "tokens": natural,
    "steps": natural,
    "pooled_auxiliary_loss": float,
    "layers": [LAYER_ROUTING],
}
EXPERTS: Shape = {
    "router": filled,
    "num_experts": natural,
    "num_experts_per_tok": natural,
    "capacity_factor": (float, None),
    "simulation": ({"even", "zipf", "one"}, None),
    "window": ROUTING_STATS,
    "total": ROUTING_STATS,
    "recomputed_tokens": natural,
}
OVERFLOW: Shape = {
    "exact": bool,
    "capacity_factor": float,
    "assigned": natural,
    "overflow": natural,
    "overflow_share": float,
    "by_layer": [natural],
    "by_expert": [[natural]],
}

# The events of GET /v1/experts/events.
PERCENTILES: Shape = {"count": natural, "p50": float, "p90": float, "p99": float}
ROUTING_SHARE: Shape = {
    "tokens": natural,
    "steps": natural,
    "share": [[float]],
    "dropped": [[natural]],
    "drop_share": [float],
    "entropy": [float],
    "entropy_share": [float],
    "imbalance": [float],
    "effective_batch": [float],
    "distinct_experts": [float],
}
LIVE_EVENT: Shape = {
    "time": float,
    "health": {"status": {"ok", "busy", "silent", "dead", "shutting_down"}, "message": (filled, None)},
    "model": {
        **dict.fromkeys(("id", "model_type", "device", "dtype", "backend", "router"), filled),
        **dict.fromkeys(("num_layers", "num_experts", "num_experts_per_tok", "max_experts_per_tok"), natural),
        **dict.fromkeys(("total_params", "active_params", "expert_params", "max_model_len", "max_num_seqs"), natural),
        **dict.fromkeys(("chat", "record_routing", "enable_prefix_caching"), bool),
        "capacity_factor": (float, None),
        "routing_simulation": ({"even", "zipf", "one"}, None),
    },
    "engine": {
        **dict.fromkeys(("num_running", "num_waiting", "num_preemptions", "recomputed_tokens", "num_steps"), natural),
        **dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens"), natural),
        "kv_cache_usage": float,
        "prefix_cache_hit_rate": (float, None),
    },
    "throughput": (
        {"seconds": float, "prompt_tokens_per_second": float, "output_tokens_per_second": float},
        None,
    ),
    "latency": {
        "seconds": natural,
        "time_to_first_token": (PERCENTILES, None),
        "inter_token": (PERCENTILES, None),
    },
    "memory": {
        "weights": {str: natural},
        **dict.fromkeys(("kv_cache", "activations", "total", "peak"), natural),
    },
    "routing": ({"recomputed_tokens": natural, "window": ROUTING_SHARE, "total": ROUTING_SHARE}, None),
}

WHOLE: dict[str, Shape] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT_COMPLETION,
    "/v1/models": {"object": {"list"}, "data": [MODEL]},
    "/v1/models/*": MODEL,
    "/tokenize": {"count": natural, "max_model_len": natural, "tokens": [natural], "token_strs": ([str], None)},
    "/detokenize": {"prompt": str},
    "/health": {"status": {"ok", "loading"}},
    "/ready": {"status": {"ready"}},
    "/version": {"version": filled},
    "/v1/experts": EXPERTS,
    "/v1/experts/what_if": {
        "capacity_factor": float,
        "window_steps": natural,
        "window": OVERFLOW,
        "total": OVERFLOW,
    },
    "/v1/experts/reset": {"status": {"reset"}},
    "/openapi.json": {
        "openapi": filled,
        "info": {str: anything},
        "servers?": [anything],
        "paths": {str: anything},
        "components": {str: anything},
        "security": [{str: [str]}],
    },
}
"""What each path answers with status 200."""
CHUNKS: dict[str, Shape] = {"/v1/completions": COMPLETION_CHUNK, "/v1/chat/completions": CHAT_CHUNK}
LIVE: dict[str, Shape] = {"/v1/experts/events": LIVE_EVENT}
"""The events of streams that go on as long as the server."""
NOT_JSON = re.compile(r"(/mixserve)?(/metrics|/|/(docs|page)(/.*)?)")
"""Paths whose answer is no JSON, also under the --root-path of the tests."""
