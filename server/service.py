"""What the routes of one app share, and what the server asks of an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from engine.grammar import GrammarError, GrammarSpec
from engine.grammar.checker import GrammarChecker
from engine.grammar.vocabulary import GrammarVocabulary
from engine.text import Tokenizer
from engine.types import CapacityWhatIf, EngineInfo, EngineStats, ExpertReport, Request, TokenEvent
from server.config import ServerConfig
from server.errors import ApiError, BadRequestError, overloaded
from server.experts import Experts
from server.feed import Feed
from server.metrics import Metrics


class Engine(Protocol):
    """What the server uses of `engine.AsyncEngine`."""

    info: EngineInfo
    error: str | None

    @property
    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool: ...

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None: ...

    def submit(self, request: Request) -> AsyncIterator[TokenEvent]: ...

    def abort(self, request_id: str) -> None: ...

    async def expert_report(self) -> ExpertReport: ...

    async def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf: ...

    async def reset_experts(self) -> ExpertReport: ...

    async def wait_dead(self) -> str: ...

    async def shutdown(self) -> None: ...


@dataclass(slots=True)
class Service:
    """One app's state: only `draining` and what is in flight ever change."""

    engine: Engine
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: Metrics
    experts: Experts
    grammars: GrammarChecker
    feed: Feed
    """Of GET /v1/experts/events."""
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    num_inflight: int = 0
    """Requests that generate, from their submission to the last byte of their answer."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there are none."""

    def __post_init__(self) -> None:
        self.idle.set()

    def enter(self) -> None:
        """One more request generates."""
        self.num_inflight += 1
        self.idle.clear()

    def leave(self) -> None:
        """One less."""
        self.num_inflight -= 1
        if self.num_inflight == 0:
            self.idle.set()

    def drain(self) -> None:
        """Take no new requests; whoever listens is told."""
        self.draining = True
        self.feed.hurry()

    def check_admission(self) -> None:
        """Raises the 503 of a server that is about to leave."""
        if self.draining:
            raise overloaded("The server is shutting down.")

    def check_model(self, name: str | None) -> str:
        """The served model's id, which is also what no id means. Raises the 404 of any other."""
        served = self.config.served_model_name
        if name is not None and name != served:
            raise ApiError(
                404, f"The model {name[:200]!r} does not exist; this server has {served!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        return served

    async def constrain(self, spec: GrammarSpec, *, param: str) -> str:
        """The grammar that a request must match, for the engine. Raises BadRequestError, which names `param`."""
        try:
            return await self.grammars.check(spec)
        except GrammarError as error:
            raise BadRequestError(f"{param}: {error}.", param=param) from None

    async def close(self) -> None:
        """End what this state has started, which is not the engine."""
        await self.feed.close()
        await self.grammars.close()
