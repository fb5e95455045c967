"""Scheduler, block manager and core together, under random arrivals, aborts and failures, with almost no memory.

Beside what the executor checks in every step (each position that is read holds what it should), the invariants here
are those that scheduling promises; see `check_plan`.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core import EngineCore
from engine.scheduler import StepPlan
from engine.sequence import Sequence, Status
from engine.types import FinishReason, Request, SamplingParams, Steering, TokenEvent
from tests.engine.cache_executor import VOCAB_SIZE, CacheExecutor, expected_answer, make_core, score

TEXT = (0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 2, 1, 0, 1, 2, 2, 1, 0, 0, 2)
MAX_STEPS = 3000


class Engine(RuleBasedStateMachine):
    runs_ahead = False

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(1, 9),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 9),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, block_size: int, num_blocks: int, max_num_seqs: int, budget: int, caching: bool) -> None:
        self.executor = CacheExecutor(block_size, on_plan=self.check_plan, runs_ahead=self.runs_ahead)
        self.core: EngineCore = make_core(
            self.executor,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.context = num_blocks * block_size
        self.live: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.num_added = self.num_generated = self.num_preempted = 0

    @precondition(lambda self: self.context > 1)
    @rule(
        shared=st.integers(0, 20),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
        max_tokens=st.one_of(st.none(), st.integers(0, 12)),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from([None, None, "s"]),
        steering=st.sampled_from([None, None, Steering(experts_per_token=1)]),
        scored=st.sampled_from([False, False, True]),
        stop=st.sampled_from([(), (), (2,)]),
    )
    def add(
        self,
        shared: int,
        own: list[int],
        max_tokens: int | None,
        priority: int,
        salt: str | None,
        steering: Steering | None,
        scored: bool,
        stop: tuple[int, ...],
    ) -> None:
        prompt = ([*TEXT[:shared], *own] or [0])[: self.context - 1]
        if max_tokens is not None:
            max_tokens = min(max_tokens, self.context - len(prompt))
        request = Request(
            request_id=f"r{self.num_added}",
            prompt_ids=tuple(prompt),
            params=SamplingParams(
                max_tokens=max_tokens,
                prompt_logprobs=0 if scored or max_tokens == 0 else None,
                stop_token_ids=stop,
            ),
            priority=priority,
            cache_salt=salt,
            steering=steering,
        )
        self.num_added += 1
        self.live[request.request_id] = request
        self.answers[request.request_id] = []
        self.core.add(request)

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)), label="request")
        self.core.abort(request_id)
        self.core.abort(request_id)  # leaving twice is leaving
        del self.live[request_id]

    @precondition(lambda self: self.live)
    @rule(sampling=st.booleans())
    def fail(self, sampling: bool) -> None:
        self.executor.fail_next, self.executor.fail_sampling = not sampling, sampling
        events = self.step()
        if self.executor.fail_next or self.executor.fail_sampling:
            assert self.runs_ahead  # everybody was waiting for a last token
            self.executor.fail_next = self.executor.fail_sampling = False
            return
        # Those who were sampled by the step before are told so first, and by then some may have ended.
        failed = [event for event in events if event.finish_reason is FinishReason.ERROR]
        ended = {event.request_id for event in events if event not in failed and event.finish_reason is not None}
        planned = [chunk.sequence.request.request_id for chunk in self.executor.plans[-1].chunks]
        assert [event.request_id for event in failed] == [name for name in planned if name not in ended]
        assert all(event.error for event in failed)
        assert self.runs_ahead or events == failed

    def step(self) -> list[TokenEvent]:
        self.running = list(self.core._scheduler.running)
        self.waiting = list(self.core._scheduler.waiting)
        self.decoding = [sequence for sequence in self.running if sequence.num_remaining == 1]
        num_plans, has_work = len(self.executor.plans), self.core.has_work
        under_way = self.core._under_way is not None
        assert has_work == bool(self.live) or under_way
        assert self.runs_ahead or not under_way
        events = self.core.step()
        new_plans = len(self.executor.plans) - num_plans
        assert new_plans == has_work or (under_way and not new_plans), "with work to do, a step does some"
        if not new_plans:
            self.num_preempted = self.core.stats().num_preemptions  # for lack of room beside one that ends
        told = [event.request_id for event in events if event.finish_reason is not FinishReason.ERROR]
        assert len(set(told)) == len(told)
        for event in events:
            self.receive(event)
        return events

    def receive(self, event: TokenEvent) -> None:
        request = self.live[event.request_id]
        answer = self.answers[event.request_id]
        first = not answer
        answer += event.token_ids
        self.num_generated += len(event.token_ids)
        expected = expected_answer(request, self.context)
        assert answer == expected[: len(answer)]
        assert event.num_cached_tokens < len(request.prompt_ids)
        if event.finish_reason is not FinishReason.ERROR:
            assert (event.finish_reason is not None) == (len(answer) == len(expected))
            if request.params.prompt_logprobs is not None:
                scores = tuple(score(token_id, p) for p, token_id in enumerate(request.prompt_ids))[1:]
                assert event.prompt_logprobs == (scores if first else None)
                assert event.num_cached_tokens == 0
        if event.finish_reason is not None:
            del self.live[event.request_id]

    def check_plan(self, plan: StepPlan) -> None:
        scheduler, blocks = self.core._scheduler, self.core._blocks
        info = self.core.info
        planned = [chunk.sequence for chunk in plan.chunks]
        assert 0 < plan.num_tokens <= info.max_num_batched_tokens
        assert len(scheduler.running) <= info.max_num_seqs
        assert set(planned) <= set(scheduler.running)
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_computed
            assert 1 <= chunk.num_tokens <= chunk.sequence.num_remaining
            assert len(chunk.sequence.block_table) == blocks.blocks_for(chunk.start + chunk.num_tokens)

        # Whoever was thrown out came after everyone who stayed; the first always advances.
        preempted = [sequence for sequence in self.running if sequence.status is Status.WAITING]
        kept = self.running[: len(self.running) - len(preempted)]
        assert self.running == kept + preempted
        due = [sequence for sequence in self.running if sequence in planned or sequence.num_remaining]
        assert not due or due[0] in planned or due[0] is not self.running[0]
        self.num_preempted += len(preempted)
        assert all(not sequence.block_table and sequence.num_computed == 0 for sequence in preempted)

        # Newcomers are the first of those who waited, and short ones that leave those before them their blocks; none
        # comes in the step in which another had to go.
        admitted = [sequence for sequence in scheduler.running if sequence not in kept]
        left = [sequence for sequence in self.waiting if sequence not in admitted]
        passing = [sequence for sequence in admitted if left and sequence.order > left[0].order]
        assert all(chunk.samples for chunk in plan.chunks if chunk.sequence in passing)
        assert (
            sum(chunk.num_tokens for chunk in plan.chunks if chunk.sequence in passing)
            <= info.max_num_batched_tokens // 2
        )
        assert not passing or blocks.num_needed(left[0], left[0].num_tokens) <= blocks.num_free
        assert not (admitted and preempted)

        # Decodes first, then prompts, then newcomers, each in order; a decode is left out only for want of a block.
        decodes = [sequence for sequence in self.decoding if sequence in kept]
        order = decodes + [sequence for sequence in kept if sequence not in decodes] + admitted
        assert planned == [sequence for sequence in order if sequence in planned]
        for sequence in decodes:
            if sequence not in planned:
                assert sequence is kept[-1]
                assert blocks.num_needed(sequence, sequence.num_tokens) > blocks.num_free

        self.check_sharing(plan, admitted)

    def check_sharing(self, plan: StepPlan, admitted: list[Sequence]) -> None:
        """A block that is written belongs to one sequence, or to newcomers too when this step fills it."""
        size = self.executor.block_size
        for chunk in plan.chunks:
            end = chunk.start + chunk.num_tokens
            for index in range(chunk.start // size, -(-end // size)):
                block = chunk.sequence.block_table[index]
                others = [s for s in self.core._scheduler.running if s is not chunk.sequence and block in s.block_table]
                if others:
                    assert (index + 1) * size <= end
                    assert all(other in admitted for other in others)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        blocks, scheduler = self.core._blocks, self.core._scheduler
        held = Counter(block for sequence in scheduler.running for block in sequence.block_table)
        assert blocks._references == [held[block] for block in range(blocks.num_blocks)]
        assert sorted([*held, *blocks._cached, *blocks._blank]) == list(range(blocks.num_blocks))
        assert all(not sequence.block_table for sequence in scheduler.waiting)

    @invariant()
    def queues_are_in_order(self) -> None:
        scheduler = self.core._scheduler
        for queue, status in ((scheduler.waiting, Status.WAITING), (scheduler.running, Status.RUNNING)):
            assert queue == sorted(queue, key=lambda sequence: sequence.order)
            assert all(sequence.status is status for sequence in queue)

    @invariant()
    def stats_count_what_happened(self) -> None:
        stats = self.core.stats()
        assert stats.num_running + stats.num_waiting == len(self.live)
        assert stats.generation_tokens == self.num_generated
        assert stats.num_preemptions == self.num_preempted
        assert stats.prefix_cache_hits <= stats.prefix_cache_queries

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(MAX_STEPS):
            if not self.core.has_work:
                break
            self.step()
        assert not self.live
        stats = self.core.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)


class EngineAhead(Engine):
    """Every step begins before the one before it is told."""

    runs_ahead = True


SETTINGS = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
TestEngine = Engine.TestCase
TestEngine.settings = SETTINGS
TestEngineAhead = EngineAhead.TestCase
TestEngineAhead.settings = SETTINGS
