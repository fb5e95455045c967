"""An event as the server sends it, made by hand."""

from __future__ import annotations

import copy
import json
from typing import Any

from server.protocol.live import LiveEvent, RoutingShare


def routing_share(num_layers: int, num_experts: int, *, tokens: int = 100) -> RoutingShare:
    """Expert e of layer l has the share of (e + l) % E + 1 in their sum; layer 0 has the most imbalance."""
    weights = [[(expert + layer) % num_experts + 1 for expert in range(num_experts)] for layer in range(num_layers)]
    return {
        "tokens": tokens,
        "steps": 10,
        "share": [[weight / sum(row) if tokens else 0.0 for weight in row] for row in weights],
        "dropped": [[0] * num_experts for _ in range(num_layers)],
        "drop_share": [0.0] * num_layers,
        "entropy": [1.0] * num_layers,
        "entropy_share": [0.9 - 0.5 * (layer == num_layers - 1) for layer in range(num_layers)],
        "imbalance": [2.5 - layer / num_layers for layer in range(num_layers)],
        "effective_batch": [1.0] * num_layers,
        "distinct_experts": [2.0] * num_layers,
    }


def live_event(num_layers: int = 4, num_experts: int = 8, **changes: Any) -> LiveEvent:
    """`changes` replace parts of it."""
    window = routing_share(num_layers, num_experts)
    total = copy.deepcopy(window)
    total["tokens"] = 12345
    event: dict[str, Any] = {
        "time": 1764013789.123,
        "health": {"status": "ok", "message": None},
        "model": {
            "id": "org/model",
            "model_type": "mixtral",
            "device": "cpu",
            "dtype": "bfloat16",
            "backend": "cpu",
            "chat": True,
            "num_layers": num_layers,
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "max_experts_per_tok": num_experts,
            "total_params": 10,
            "active_params": 5,
            "expert_params": 1,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "router": "topk_softmax",
            "capacity_factor": None,
            "routing_simulation": None,
            "record_routing": True,
            "enable_prefix_caching": True,
        },
        "engine": {
            "num_running": 3,
            "num_waiting": 1,
            "kv_cache_usage": 0.127,
            "prefix_cache_queries": 10,
            "prefix_cache_hits": 4,
            "prefix_cache_hit_rate": 0.4,
            "num_preemptions": 2,
            "recomputed_tokens": 0,
            "num_steps": 10,
            "prompt_tokens": 100,
            "generation_tokens": 50,
        },
        "throughput": {"seconds": 5.0, "prompt_tokens_per_second": 12.5, "output_tokens_per_second": 1234.56},
        "latency": {
            "seconds": 60,
            "time_to_first_token": {"count": 3, "p50": 0.0204, "p90": 0.0311, "p99": 1.5},
            "inter_token": None,
        },
        "memory": {
            "weights": {"expert": 3 * 10**9, "router": 10**6},
            "kv_cache": 10**9,
            "activations": 10**8,
            "total": 64 * 10**9,
            "peak": 5 * 10**9,
        },
        "routing": {"recomputed_tokens": 0, "window": window, "total": total},
    }
    made: LiveEvent = json.loads(json.dumps(event | changes))
    return made
