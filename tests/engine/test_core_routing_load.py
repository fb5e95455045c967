"""Counts under load: 500 mixed requests, and an executor that counts for itself what it is told to compute."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from engine.core import EngineCore
from engine.executor import LocalExecutor, Step
from engine.routing.record import RoutingRecord
from engine.scheduler import StepPlan
from engine.types import ExpertVisits, Request, SamplingParams, Steering, TokenEvent
from tests.engine.cores import make_core
from tests.tiny import write_tiny_mixtral

VOCAB, LAYERS, EXPERTS, TOP_K = 97, 2, 5, 2

STEERINGS = [
    None,
    None,
    None,
    Steering(experts_per_token=1),
    Steering(experts_per_token=EXPERTS),
    Steering(min_p=1.0),
    Steering(forbidden=((None, (4,)),)),
    Steering(forbidden=((0, (1, 2, 3, 4)), (1, (0,))), experts_per_token=3),
    Steering(forbidden=((None, (0, 1)), (1, (2,))), experts_per_token=EXPERTS),
    *(Steering(experts_per_token=1 + index % EXPERTS, forbidden=((index % 2, (index,)),)) for index in range(5)),
]
"""More ways than the batch has places, so that slots are given up and filled again."""


def num_experts(steering: Steering | None, layer: int) -> int:
    """K of a row in a layer, by arithmetic alone: a min-p of 1 leaves the best."""
    if steering is None:
        return TOP_K
    if steering.min_p == 1.0:
        return 1
    forbidden = {expert for where, experts in steering.forbidden if where in (None, layer) for expert in experts}
    return min(steering.experts_per_token or TOP_K, EXPERTS - len(forbidden))


@dataclass
class CountingExecutor:
    """Counts the rows of every plan by request and layer; looks at each row's experts in the record."""

    inner: LocalExecutor
    num_rows: int = 0
    num_recomputed: int = 0
    assigned: Counter[int] = field(default_factory=Counter)
    visits: Counter[str] = field(default_factory=Counter)
    rows_of: Counter[str] = field(default_factory=Counter)
    reached: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_chunked: int = 0
    most_ways: int = 0

    @property
    def runs_ahead(self) -> bool:
        return self.inner.runs_ahead

    def forward(self, plan: StepPlan) -> Step:
        step = self.inner.forward(plan)
        record = self.inner.runner.record
        assert record is not None
        first = 0
        for chunk in plan.chunks:
            request = chunk.sequence.request
            rows = slice(first, first + chunk.num_tokens)
            first += chunk.num_tokens
            self.num_rows += chunk.num_tokens
            self.rows_of[request.request_id] += chunk.num_tokens
            end = chunk.start + chunk.num_tokens
            self.num_recomputed += max(0, min(end, self.reached[request.request_id]) - chunk.start)
            self.reached[request.request_id] = max(end, self.reached[request.request_id])
            self.num_chunked += not chunk.samples
            for layer in range(LAYERS):
                count = num_experts(request.steering, layer)
                self.assigned[layer] += chunk.num_tokens * count
                self.visits[request.request_id] += chunk.num_tokens * count
                check_rows(record.expert_ids[layer, rows].tolist(), request.steering, layer, count)
        self.most_ways = max(self.most_ways, len({chunk.sequence.request.steering for chunk in plan.chunks}))
        return step

    def peak_memory_bytes(self) -> int:
        return 0

    def routing_record(self) -> RoutingRecord | None:
        return self.inner.routing_record()


def check_rows(rows: list[list[int]], steering: Steering | None, layer: int, count: int) -> None:
    """Each row has its own K, and no forbidden expert. Columns beyond the step's K are of earlier steps."""
    forbidden = {
        expert
        for where, experts in (steering.forbidden if steering else ())
        if where in (None, layer)
        for expert in experts
    }
    for row in rows:
        used = row[:count]
        assert min(used) >= 0
        assert len(set(used)) == count
        assert not forbidden & set(used)


def make_requests(rng: random.Random) -> list[Request]:
    prefixes = [[rng.randrange(VOCAB) for _ in range(13)] for _ in range(4)]
    requests = []
    for index in range(500):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 9, 20, 41]))]
        prompt = rng.choice(prefixes) + own if index % 3 == 0 else own
        # Shared beginnings of some are steered alike, so that the cache serves steered requests too.
        steering = STEERINGS[index % 4] if index % 3 == 0 else rng.choice(STEERINGS)
        params = SamplingParams(max_tokens=rng.randint(1, 12), temperature=1.0, seed=index, ignore_eos=True)
        requests.append(Request(request_id=f"r{index}", prompt_ids=tuple(prompt), params=params, steering=steering))
    return requests


def serve(core: EngineCore, requests: list[Request], rng: random.Random) -> tuple[dict[str, TokenEvent], set[str]]:
    """Up to six arrive a step; every twelfth is aborted while it waits or runs. Last events, and who was aborted."""
    doomed = {request.request_id: rng.randrange(0, 8) for request in requests[::12]}
    pending, last, aborted = list(reversed(requests)), dict[str, TokenEvent](), set[str]()
    live: dict[str, int] = {}
    while pending or core.has_work:
        for _ in range(min(len(pending), rng.randrange(7))):
            request = pending.pop()
            core.add(request)
            live[request.request_id] = 0
        for event in core.step():
            last[event.request_id] = event
            if event.finish_reason is not None:
                del live[event.request_id]
        for request_id in list(live):
            live[request_id] += 1
            if live[request_id] > doomed.get(request_id, 10**9):
                core.abort(request_id)
                aborted.add(request_id)
                del live[request_id]
    return last, aborted


@pytest.mark.parametrize("seed", [0, 1])
def test_counts_under_load(tmp_path: Path, seed: int) -> None:
    write_tiny_mixtral(tmp_path, vocab_size=VOCAB, num_experts=EXPERTS, max_position_embeddings=8192, seed=2)
    rng = random.Random(seed)
    built = make_core(tmp_path, num_blocks=40, max_num_batched_tokens=37, max_num_seqs=9, record_routing=True)
    assert isinstance(built._executor, LocalExecutor)
    executor = CountingExecutor(built._executor)
    core = EngineCore(executor, built.info)
    requests = make_requests(rng)
    last, aborted = serve(core, requests, rng)

    total, stats = core.expert_report().total, core.stats()
    assert total.tokens == executor.num_rows
    assert total.steps == stats.num_steps
    for layer, figures in enumerate(total.layers):
        assert sum(figures.assigned) == executor.assigned[layer]
        assert figures.assigned == figures.dispatched
        assert figures.dropped == 0
    assert core.expert_report().recomputed_tokens == stats.recomputed_tokens == executor.num_recomputed > 0
    window = core.routing_record().snapshot().window
    assert int(window.tokens.sum()) == core.expert_report().window.tokens
    assert np.array(core.expert_report().window.layers[0].assigned).sum() == int(window.assigned[:, 0].sum())

    # Whoever was not aborted had every token computed once, but the last, and those the cache had; and again what a
    # preemption threw away.
    finished = [request for request in requests if request.request_id not in aborted]
    assert len(finished) + len(aborted) == 500
    for request in finished:
        event = last[request.request_id]
        assert request.params.max_tokens is not None
        needed = len(request.prompt_ids) + request.params.max_tokens - 1 - event.num_cached_tokens
        assert executor.rows_of[request.request_id] >= needed
        if request.steering is not None:
            rows, visits = executor.rows_of[request.request_id], executor.visits[request.request_id]
            assert event.expert_visits == ExpertVisits(visits, rows)
    once = sum(executor.reached[request.request_id] for request in requests)
    cached = sum(last[request.request_id].num_cached_tokens for request in finished)
    assert stats.prefix_cache_hits >= cached > 0
    assert total.tokens == once - stats.prefix_cache_hits + stats.recomputed_tokens

    assert len(aborted) > 20
    assert stats.num_preemptions > 20
    assert executor.num_chunked > 20
    assert executor.most_ways > 5
