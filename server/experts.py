"""The engine's routing statistics, as the server keeps them: resettable for people, ever growing for Prometheus."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from engine.errors import EngineError
from engine.types import CapacityWhatIf, EngineInfo, ExpertReport, RoutingStats

SCRAPE_SECONDS = 1.0
"""How long a scrape waits for the engine, which answers between two steps."""


class RoutingEngine(Protocol):
    """What of an engine this needs."""

    info: EngineInfo

    @property
    def healthy(self) -> bool: ...

    async def expert_report(self) -> ExpertReport: ...

    async def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf: ...

    async def reset_experts(self) -> ExpertReport: ...


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """Since the server started, whatever was reset since then."""

    dispatched: tuple[tuple[int, ...], ...]
    """By layer and expert."""
    dropped: tuple[int, ...]
    """By layer."""

    @classmethod
    def of(cls, stats: RoutingStats) -> ExpertCounts:
        return cls(tuple(layer.dispatched for layer in stats.layers), tuple(layer.dropped for layer in stats.layers))

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            tuple(
                tuple(map(sum, zip(mine, theirs, strict=True)))
                for mine, theirs in zip(self.dispatched, other.dispatched, strict=True)
            ),
            tuple(map(sum, zip(self.dropped, other.dropped, strict=True))),
        )


@dataclass(frozen=True, slots=True)
class ExpertScrape:
    """For one scrape: the counters, and the latest steps for the gauges."""

    counts: ExpertCounts
    window: RoutingStats


class Experts:
    """Asks the engine. A report and what it is added to must not be apart by a reset: both hold the lock."""

    def __init__(self, engine: RoutingEngine) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self._before: ExpertCounts | None = None  # what resets have made the engine forget

    async def report(self) -> ExpertReport:
        """Raises InvalidRequestError when routing is not recorded, and EngineDeadError; so do the next two."""
        return await self._engine.expert_report()

    async def what_if(self, capacity_factor: float) -> CapacityWhatIf:
        return await self._engine.capacity_what_if(capacity_factor)

    async def reset(self) -> None:
        """Start anew. Once begun it is finished, even if nobody waits any more: else counters would go backwards."""
        await asyncio.shield(asyncio.ensure_future(self._reset()))

    async def _reset(self) -> None:
        async with self._lock:
            self._before = self._since_start(await self._engine.reset_experts())

    async def scrape(self, within: float = SCRAPE_SECONDS) -> ExpertScrape | None:
        """None when routing is not recorded, and when the engine is dead or does not answer `within` seconds."""
        if not self._engine.info.record_routing or not self._engine.healthy:
            return None
        try:
            async with asyncio.timeout(within), self._lock:
                report = await self._engine.expert_report()
                return ExpertScrape(self._since_start(report), report.window)
        except (TimeoutError, EngineError):
            return None

    def _since_start(self, report: ExpertReport) -> ExpertCounts:
        counts = ExpertCounts.of(report.total)
        return counts if self._before is None else self._before + counts
