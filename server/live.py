"""What the events of GET /v1/experts/events hold: the engine, its routing and the latest times, in one value."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import sub
from typing import Protocol

from engine.errors import EngineError
from engine.types import EngineInfo, EngineStats, ExpertReport, RoutingStats
from server.json_io import dump
from server.metrics import kv_cache_usage
from server.protocol.live import (
    EngineNow,
    HealthNow,
    Latency,
    LiveEvent,
    MemoryNow,
    ModelFacts,
    RoutingShare,
    Throughput,
)

ANSWER_SECONDS = 0.8
"""How long an event waits for the engine, which answers between two steps."""
_RATE_SECONDS = 5.5
"""Of events a second apart, the latest six: rates are those of five seconds."""
_LEAST_SECONDS = 0.5
"""Rates over less would say little."""
_SCALE = 10_000


class LiveEngine(Protocol):
    """What of an engine this needs."""

    info: EngineInfo
    error: str | None

    @property
    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool: ...

    async def expert_report(self) -> ExpertReport: ...


class LiveView:
    """Puts the events together. Each has all there is to know, so that a reader may begin, or go on, with any."""

    def __init__(
        self,
        engine: LiveEngine,
        latency: Callable[[], Latency],
        *,
        model_id: str,
        has_chat: bool,
        leaving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`leaving`: whether the server is shutting down. `clock` is in seconds."""
        self._engine = engine
        self._latency = latency
        self._leaving = leaving
        self._clock = clock
        self._model = _model_facts(engine.info, model_id, has_chat=has_chat)
        self._report: ExpertReport | None = None
        self._asking: asyncio.Task[None] | None = None
        self._counts: deque[tuple[float, int, int]] = deque()  # (when, prompt tokens, generated tokens)

    async def event(self) -> bytes:
        """The whole server-sent event of now. Takes up to ANSWER_SECONDS."""
        answered = await self._ask()
        return b"data: " + dump(self._now(answered)) + b"\n\n"

    async def _ask(self) -> bool:
        """Get a new report. False when the engine is too busy: its answer then counts for a later event."""
        if not self._engine.info.record_routing or not self._engine.healthy:
            return True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._keep_report())
        done, _ = await asyncio.wait({self._asking}, timeout=ANSWER_SECONDS)
        for asking in done:
            asking.result()  # raises what nobody expects
        return bool(done)

    async def _keep_report(self) -> None:
        with suppress(EngineError):  # then it is dead, which `healthy` tells
            self._report = await self._engine.expert_report()

    def _now(self, answered: bool) -> LiveEvent:
        stats, report = self._engine.stats, self._report
        return {
            "time": round(time.time(), 3),
            "health": self._health(answered),
            "model": self._model,
            "engine": _engine_now(stats),
            "throughput": self._throughput(stats),
            "latency": self._latency(),
            "memory": _memory_now(self._engine.info, stats),
            "routing": None
            if report is None
            else {
                "recomputed_tokens": report.recomputed_tokens,
                "window": routing_share(report.window),
                "total": routing_share(report.total),
            },
        }

    def _health(self, answered: bool) -> HealthNow:
        if self._engine.error is not None:
            return {"status": "dead", "message": f"The engine is dead: {self._engine.error}."}
        if self._leaving():
            return {"status": "shutting_down", "message": "The server is shutting down."}
        if not self._engine.healthy:
            return {"status": "silent", "message": "The engine does not answer."}
        if not answered:
            return {"status": "busy", "message": "The engine is in a long step; its routing is of an earlier moment."}
        return {"status": "ok", "message": None}

    def _throughput(self, stats: EngineStats) -> Throughput | None:
        now = self._clock()
        while self._counts and now - self._counts[0][0] > _RATE_SECONDS:
            self._counts.popleft()
        self._counts.append((now, stats.prompt_tokens, stats.generation_tokens))
        began, prompt_tokens, generation_tokens = self._counts[0]
        seconds = now - began
        if seconds < _LEAST_SECONDS:
            return None
        return {
            "seconds": round(seconds, 2),
            "prompt_tokens_per_second": round((stats.prompt_tokens - prompt_tokens) / seconds, 1),
            "output_tokens_per_second": round((stats.generation_tokens - generation_tokens) / seconds, 1),
        }


def routing_share(stats: RoutingStats) -> RoutingShare:
    """The figures of `stats` as shares, which fit any amount of traffic."""
    layers = stats.layers
    return {
        "tokens": stats.tokens,
        "steps": stats.steps,
        "share": [_shares(layer.assigned) for layer in layers],
        "dropped": [
            list(map(sub, layer.assigned, layer.dispatched)) if layer.dropped else [0] * len(layer.assigned)
            for layer in layers
        ],
        "drop_share": _rounded(layer.dropped / max(sum(layer.assigned), 1) for layer in layers),
        "entropy": _rounded(layer.entropy for layer in layers),
        "entropy_share": _rounded(layer.entropy_share for layer in layers),
        "imbalance": _rounded(layer.max_over_mean for layer in layers),
        "effective_batch": _rounded(layer.effective_batch for layer in layers),
        "distinct_experts": _rounded(layer.distinct_experts for layer in layers),
    }


def _shares(counts: Sequence[int]) -> list[float]:
    """Of each count in their sum, with four decimals; in a way that is quick for thousands of them."""
    scale = _SCALE / max(sum(counts), 1)
    return [int(count * scale + 0.5) / _SCALE for count in counts]


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _model_facts(info: EngineInfo, model_id: str, *, has_chat: bool) -> ModelFacts:
    return {
        "id": model_id,
        "model_type": info.model_type,
        "device": info.device,
        "dtype": info.dtype,
        "backend": info.backend,
        "chat": has_chat,
        "num_layers": info.num_layers,
        "num_experts": info.num_experts,
        "num_experts_per_tok": info.num_experts_per_tok,
        "max_experts_per_tok": info.max_experts_per_tok,
        "total_params": info.total_params,
        "active_params": info.active_params,
        "expert_params": info.expert_params,
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "router": info.router,
        "capacity_factor": info.capacity_factor,
        "routing_simulation": info.routing_simulation,
        "record_routing": info.record_routing,
        "enable_prefix_caching": info.enable_prefix_caching,
    }


def _engine_now(stats: EngineStats) -> EngineNow:
    queries = stats.prefix_cache_queries
    return {
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "kv_cache_usage": round(kv_cache_usage(stats), 4),
        "prefix_cache_queries": queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "prefix_cache_hit_rate": round(stats.prefix_cache_hits / queries, 4) if queries else None,
        "num_preemptions": stats.num_preemptions,
        "recomputed_tokens": stats.recomputed_tokens,
        "num_steps": stats.num_steps,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
    }


def _memory_now(info: EngineInfo, stats: EngineStats) -> MemoryNow:
    memory = info.memory
    return {
        "weights": memory.weights,
        "kv_cache": memory.kv_cache,
        "activations": memory.activations,
        "total": memory.total,
        "peak": stats.peak_memory_bytes,
    }
