"""Cores over tiny checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import Request, SamplingParams, Steering, TokenEvent, TokenRouting


def make_core(checkpoint: Path, *, num_blocks: int = 512, **options: Any) -> EngineCore:
    """A float32 core with exactly `num_blocks` blocks of 4 tokens."""
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 kv heads, head_dim 8, float32
    config = EngineConfig(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        block_size=4,
        max_model_len=num_blocks * 4,
        kv_cache_memory_bytes=num_blocks * 4 * bytes_per_token,
    )
    return EngineCore.build(replace(config, **options))


def run(core: EngineCore, *requests: Request) -> dict[str, list[TokenEvent]]:
    """All events of `requests`, by request; whatever else is in the core runs on as well."""
    events: dict[str, list[TokenEvent]] = {}
    for request in requests:
        core.add(request)
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def greedy(request_id: str, prompt: list[int], max_tokens: int, steering: Steering | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id=request_id, prompt_ids=tuple(prompt), params=params, steering=steering)


def traces(events: list[TokenEvent]) -> list[TokenRouting]:
    """The routing of a request's prompt tokens, then of its output tokens, as far as it was asked for."""
    return [entry for event in events for entry in (*(event.prompt_routing or ()), *(event.routing or ()))]
