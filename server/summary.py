"""What `mixserve serve` says when it is ready: what was loaded, where memory went, and a line to try."""

from __future__ import annotations

import json
import shlex

from engine.types import EngineInfo, MemoryUse


def summary(info: EngineInfo, *, model_name: str, url: str, chat: bool, needs_key: bool) -> str:
    """A few lines for people. `chat`: whether the model has a chat template."""
    rate = info.load_bytes / info.load_seconds / 1e9 if info.load_seconds else 0.0
    memory = info.memory
    weights = ", ".join(f"{kind} {_size(num_bytes)}" for kind, num_bytes in memory.weights.items())
    cache_tokens = info.num_blocks * info.block_size
    return "\n".join(
        [
            f"{model_name}: {info.model_type}, {_count(info.total_params)} parameters, "
            f"{_count(info.active_params)} active for a token "
            f"({info.num_layers} layers, top-{info.num_experts_per_tok} of {info.num_experts} experts)",
            f"  engine    {info.backend} backend, {info.dtype} on {info.device}; "
            f"loaded {_size(info.load_bytes)} in {info.load_seconds:.1f} s ({rate:.2f} GB/s)",
            f"  weights   {_size(sum(memory.weights.values()))} ({weights})",
            f"  KV cache  {_size(memory.kv_cache)}: {cache_tokens:,} tokens in blocks of {info.block_size}, "
            f"prefix caching {'on' if info.enable_prefix_caching else 'off'}",
            f"  routing   {_routing(info)}",
            f"  batch     up to {info.max_num_seqs} sequences of {info.max_model_len:,} tokens, "
            f"{info.max_num_batched_tokens:,} tokens a step; activations {_size(memory.activations)}",
            f"  memory    {_size(_in_all(memory))} of {_size(memory.total)}",
            *_measured(memory),
            *_warning(info),
            "",
            f"Serving on {url}. Try:",
            "",
            _curl(model_name, url, chat=chat, needs_key=needs_key),
            "",
        ]
    )


def _in_all(memory: MemoryUse) -> int:
    return sum(memory.weights.values()) + memory.kv_cache + memory.activations + memory.graphs


def _measured(memory: MemoryUse) -> list[str]:
    """One line, where anything was: measured, and how far off what was planned."""
    parts = [
        f"{kind} {_size(size)} (planned {_size(planned)}{f', {size / planned - 1:+.1%}' if planned else ''})"
        for kind, size in memory.measured.items()
        if (planned := memory.predicted[kind]) or size
    ]
    return [f"  measured  {', '.join(parts)}"] if parts else []


def _routing(info: EngineInfo) -> str:
    factor = "" if info.capacity_factor is None else f", capacity factor {info.capacity_factor:g}"
    recorded = "recorded" if info.record_routing else "not recorded"
    # What a block of the cache holds would depend on a batch's other requests, or on chance.
    uncached = info.capacity_factor is not None or info.router in ("gshard", "noisy_topk")
    note = "; no prefix caching with a capacity or random draws" if uncached and not info.enable_prefix_caching else ""
    router = info.router if info.routing_simulation is None else f"simulated ({info.routing_simulation})"
    return f"{router}{factor}, {recorded}{note}"


def _warning(info: EngineInfo) -> list[str]:
    if info.routing_simulation is None:
        return []
    return [
        "",
        f"  !!! ROUTING IS SIMULATED ({info.routing_simulation}): the router is not asked, the answers mean nothing.",
        "  !!! For load tests only; start without --routing-simulation to serve the model.",
    ]


def _curl(model_name: str, url: str, *, chat: bool, needs_key: bool) -> str:
    body: dict[str, object]
    if chat:
        path = "/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": True}
    else:
        path = "/v1/completions"
        body = {"prompt": "The capital of France is", "stream": True}
    data = shlex.quote(json.dumps({"model": model_name} | body))
    key = ' -H "Authorization: Bearer $MIXSERVE_API_KEY"' if needs_key else ""
    return f"  curl -N {url}{path}{key} -H 'Content-Type: application/json' -d {data}"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
