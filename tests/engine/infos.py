"""What an engine without a model says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.types import EngineInfo, MemoryUse

_INFO = EngineInfo(
    model="none",
    model_type="mixtral",
    device="cpu",
    dtype="float32",
    backend="torch",
    vocab_size=1000,
    num_layers=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_model_len=64,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    block_size=4,
    num_blocks=64,
    enable_prefix_caching=True,
    router="topk_softmax",
    capacity_factor=None,
    routing_simulation=None,
    record_routing=True,
    max_experts_per_tok=4,
    expert_params=0,
    eos_token_ids=(),
    total_params=1,
    active_params=1,
    load_seconds=0.0,
    load_bytes=0,
    memory=MemoryUse(weights={"expert": 1}, total=2),
    pid=1,
)


def engine_info(**fields: Any) -> EngineInfo:
    """Small figures that fit together, with `fields` replaced."""
    return replace(_INFO, **fields)
