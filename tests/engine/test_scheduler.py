"""Scheduler: who is computed when, in plans small enough to write down. Random ones: test_scheduler_model.py."""

from __future__ import annotations

import pytest

from engine.block_manager import BlockManager
from engine.scheduler import Chunk, Scheduler, StepPlan
from engine.sequence import Sequence, Status
from engine.types import FinishReason, Request, SamplingParams, TokenEvent
from tests.engine.cache_executor import CacheExecutor, expected_answer, make_core, score
from tests.engine.sequences import make_sequence


class Queue:
    """A scheduler whose plans are carried out at once: every chunk is computed, every sample is token 1."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        caching: bool = False,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.num_added = 0

    def add(self, num_tokens: int, *, priority: int = 0) -> Sequence:
        ids = [100 * self.num_added + i for i in range(num_tokens)]
        sequence = make_sequence(ids, priority=priority, arrival=self.num_added)
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int, int]]:
        """The plan as (request, start, number of tokens)."""
        plan = self.scheduler.schedule()
        shown = [(chunk.sequence.request.request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks]
        sampling = [chunk.samples for chunk in plan.chunks]
        for chunk, samples in zip(plan.chunks, sampling, strict=True):
            chunk.sequence.num_computed += chunk.num_tokens
            if samples:
                chunk.sequence.token_ids.append(1)
        return shown


def test_a_chunk_samples_when_it_ends_with_the_last_known_token() -> None:
    sequence = make_sequence(list(range(10)))
    assert [Chunk(sequence, start, 5).samples for start in (0, 4, 5)] == [False, False, True]
    assert StepPlan((Chunk(sequence, 0, 5), Chunk(sequence, 5, 2))).num_tokens == 7


def test_a_long_prompt_is_cut_into_what_the_decodes_leave() -> None:
    queue = Queue(budget=6)
    queue.add(2)
    assert queue.step() == [("r0", 0, 2)]
    queue.add(3)
    assert queue.step() == [("r0", 2, 1), ("r1", 0, 3)]
    queue.add(11)
    assert queue.step() == [("r0", 3, 1), ("r1", 3, 1), ("r2", 0, 4)]
    queue.add(3)  # more than half of what is left
    assert queue.step() == [("r0", 4, 1), ("r1", 4, 1), ("r2", 4, 4)]
    assert queue.step() == [("r0", 5, 1), ("r1", 5, 1), ("r2", 8, 3), ("r3", 0, 1)]
    assert queue.step() == [("r0", 6, 1), ("r1", 6, 1), ("r2", 11, 1), ("r3", 1, 2)]


def test_several_prompts_share_a_step() -> None:
    queue = Queue(budget=16)
    for num_tokens in (5, 1, 7, 9):
        queue.add(num_tokens)
    assert queue.step() == [("r0", 0, 5), ("r1", 0, 1), ("r2", 0, 7), ("r3", 0, 3)]
    assert queue.step() == [("r0", 5, 1), ("r1", 1, 1), ("r2", 7, 1), ("r3", 3, 6)]


def test_no_more_run_than_may() -> None:
    queue = Queue(max_num_seqs=2)
    sequences = [queue.add(2) for _ in range(3)]
    assert [name for name, _, _ in queue.step()] == ["r0", "r1"]
    queue.scheduler.finish(sequences[0])
    assert [name for name, _, _ in queue.step()] == ["r1", "r2"]


def test_no_more_run_than_the_budget_can_advance() -> None:
    queue = Queue(max_num_seqs=8, budget=3)
    for _ in range(5):
        queue.add(1)
    assert [name for name, _, _ in queue.step()] == ["r0", "r1", "r2"]
    assert [name for name, _, _ in queue.step()] == ["r0", "r1", "r2"]


def test_lower_priority_values_go_first_and_equals_in_order_of_arrival() -> None:
    queue = Queue(max_num_seqs=1)
    sequences = [queue.add(2, priority=priority) for priority in (5, 0, -3, 0)]
    order = []
    while queue.scheduler.has_work:
        ((name, _, _),) = queue.step()
        order.append(name)
        queue.scheduler.finish(sequences[int(name[1:])])
    assert order == ["r2", "r1", "r3", "r0"]


def test_a_prompt_comes_in_only_when_all_of_it_fits() -> None:
    queue = Queue(num_blocks=5, block_size=4, budget=8)
    first = queue.add(8)
    assert queue.step() == [("r0", 0, 8)]
    queue.add(13)  # 4 blocks, and after r0's next token 2 are left
    queue.add(1)  # would fit, and waits for its turn
    assert queue.step() == [("r0", 8, 1)]
    queue.scheduler.finish(first)
    assert queue.step() == [("r1", 0, 7), ("r2", 0, 1)]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    queue = Queue(budget=100, num_blocks=256)
    queue.add(400)
    assert queue.step() == [("r0", 0, 100)]
    for num_tokens in (200, 30, 40):
        queue.add(num_tokens)
    assert queue.step() == [("r0", 100, 70), ("r2", 0, 30)]  # half of the step has no room for r3 as well
    assert queue.step() == [("r2", 30, 1), ("r0", 170, 59), ("r3", 0, 40)]
    assert queue.step() == [("r2", 31, 1), ("r3", 40, 1), ("r0", 229, 98)]
    assert [name for name, _, _ in queue.step()] == ["r2", "r3", "r0", "r1"]


def test_a_short_prompt_takes_no_blocks_from_a_long_one_that_waits_for_them() -> None:
    queue = Queue(budget=8, block_size=4, num_blocks=6)
    queue.add(20)
    assert queue.step() == [("r0", 0, 8)]
    queue.add(16)  # 4 blocks, as many as are free now
    queue.add(2)
    for tokens in (8, 4, 1, 1):
        ((name, _, num_tokens),) = queue.step()
        assert (name, num_tokens) == ("r0", tokens)


def test_a_short_prompt_takes_no_place_from_one_that_waits_before_it() -> None:
    queue = Queue(budget=100, num_blocks=256, max_num_seqs=2)
    queue.add(150)
    assert queue.step() == [("r0", 0, 100)]
    queue.add(150)
    queue.add(4)
    assert queue.step() == [("r0", 100, 50), ("r1", 0, 50)]
    assert queue.step() == [("r0", 150, 1), ("r1", 50, 99)]


def test_nothing_is_kept_for_those_who_cannot_come_in() -> None:
    queue = Queue(budget=100, num_blocks=256, max_num_seqs=2)
    queue.add(400)
    for _ in range(6):
        queue.add(8)
    assert queue.step() == [("r0", 0, 92), ("r1", 0, 8)]


def test_a_prompt_that_fits_whole_is_not_cut_for_one_behind_a_longer_one() -> None:
    queue = Queue(budget=100, num_blocks=256)
    for num_tokens in (90, 400, 30, 5):
        queue.add(num_tokens)
    assert queue.step() == [("r0", 0, 90), ("r1", 0, 5), ("r3", 0, 5)]


def test_the_last_in_order_is_preempted_and_starts_over() -> None:
    queue = Queue(num_blocks=4, block_size=2)
    first, second, third = queue.add(2, priority=1), queue.add(2), queue.add(2)
    assert queue.step() == [("r1", 0, 2), ("r2", 0, 2), ("r0", 0, 2)]
    assert queue.step() == [("r1", 2, 1), ("r2", 2, 1)]  # one block was left; r0 came first, and has the last place
    assert first.status is Status.WAITING
    assert (first.num_computed, first.block_table, first.num_tokens) == (0, [], 3)
    assert queue.scheduler.num_preemptions == 1
    assert queue.step() == [("r1", 3, 1), ("r2", 3, 1)]
    assert queue.step() == [("r1", 4, 1)]  # r2 had to go too
    assert queue.scheduler.num_preemptions == 2
    queue.scheduler.finish(second)
    assert queue.step() == [("r2", 0, 5)]  # its answer so far is computed again, in one go
    queue.scheduler.finish(third)
    assert queue.step() == [("r0", 0, 3)]


def test_one_that_was_planned_already_can_still_be_preempted() -> None:
    """A prompt is planned after the decodes and may come before them in order: then the plan forgets their tokens."""
    queue = Queue(num_blocks=6, block_size=2, budget=3, caching=True)
    late = queue.add(2)
    assert queue.step() == [("r0", 0, 2)]
    urgent = queue.add(8, priority=-1)
    for start in (0, 2, 4):
        assert queue.step() == [("r0", 2 + start // 2, 1), ("r1", start, 2)]
    assert queue.blocks.num_free == 0
    assert queue.step() == [("r1", 6, 2)]  # its fourth block was r0's, which had its token 5 planned
    assert late.status is Status.WAITING
    assert queue.scheduler.num_preemptions == 1
    queue.scheduler.finish(urgent)
    assert queue.step() == [("r0", 4, 2)]  # the two blocks it had computed are still known


def test_nothing_comes_in_when_another_had_to_go() -> None:
    queue = Queue(num_blocks=3, block_size=2)
    queue.add(2)
    queue.add(3)
    assert queue.step() == [("r0", 0, 2), ("r1", 0, 3)]
    assert queue.step() == [("r0", 2, 1)]
    queue.add(1)
    assert queue.step() == [("r0", 3, 1)]
    assert [sequence.request.request_id for sequence in queue.scheduler.waiting] == ["r1", "r2"]


def test_nobody_comes_in_past_a_running_prompt_that_lacks_blocks() -> None:
    """What is free then is what that prompt waits for: whoever took it would be thrown out in the next step."""
    queue = Queue(num_blocks=8, block_size=2, budget=8)
    for _ in range(3):
        queue.add(2)
    queue.add(9)  # 5 blocks, as many as the first three leave, until they grow
    assert queue.step() == [("r0", 0, 2), ("r1", 0, 2), ("r2", 0, 2), ("r3", 0, 2)]
    queue.add(1)
    assert queue.step() == [("r0", 2, 1), ("r1", 2, 1), ("r2", 2, 1)]  # one block is free, r3 needs three
    assert queue.step() == [("r0", 3, 1), ("r1", 3, 1), ("r2", 3, 1)]
    assert queue.scheduler.num_preemptions == 0


@pytest.mark.parametrize("running", [True, False])
def test_finishing_frees_everything(running: bool) -> None:
    queue = Queue()
    sequence = queue.add(9)
    if running:
        queue.step()
    queue.scheduler.finish(sequence)
    assert sequence.status is Status.FINISHED
    assert not queue.scheduler.has_work
    assert queue.blocks.num_free == 64
    assert queue.step() == []


def request(request_id: str, prompt_ids: list[int], **params: object) -> Request:
    return Request(request_id=request_id, prompt_ids=tuple(prompt_ids), params=SamplingParams(**params))  # type: ignore[arg-type]


def run(executor: CacheExecutor, requests: list[Request], **options: int) -> dict[str, list[TokenEvent]]:
    """The events of `requests`, all there from the start, by request."""
    core = make_core(executor, **{"num_blocks": 300, **options})  # type: ignore[arg-type]
    for each in requests:
        core.add(each)
    events: dict[str, list[TokenEvent]] = {each.request_id: [] for each in requests}
    while core.has_work:
        for event in core.step():
            events[event.request_id].append(event)
    assert core.stats().num_free_blocks == core.info.num_blocks
    for each in requests:
        answer = [token_id for event in events[each.request_id] for token_id in event.token_ids]
        assert answer == expected_answer(each, core.info.max_model_len)
    return events


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("budget", [2048, 300, 1001])
def test_a_prefix_shared_by_many_that_come_at_once_is_computed_once(block_size: int, budget: int) -> None:
    shared = [i * i % 3 for i in range(1000)]
    requests = [request(f"r{i}", [*shared, i % 3, *[1] * i], max_tokens=3) for i in range(6)]
    executor = CacheExecutor(block_size)
    events = run(executor, requests, max_num_batched_tokens=budget)
    cached = 1000 // block_size * block_size
    assert [events[f"r{i}"][0].num_cached_tokens for i in range(6)] == [0, *[cached] * 5]
    own = sum(len(each.prompt_ids) - cached for each in requests)
    assert executor.num_computed == cached + own + 6 * 2  # the third token of an answer is not computed


def test_a_prefix_shared_by_many_that_come_one_after_another_is_computed_once() -> None:
    shared = [i * i % 3 for i in range(1000)]
    executor = CacheExecutor(8)
    core = make_core(executor, num_blocks=140)  # less than two of them
    for i in range(6):
        before = executor.num_computed
        core.add(request(f"r{i}", [*shared, i % 3, *[2] * i], max_tokens=1))
        (event,) = core.step()
        assert event.num_cached_tokens == (1000 if i else 0)
        assert executor.num_computed - before == 1001 + i - event.num_cached_tokens
    stats = core.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (6 * 1001 + 15, 5 * 1000)
    assert (stats.prompt_tokens, stats.generation_tokens) == (6 * 1001 + 15, 6)


def test_a_preempted_request_reports_and_counts_its_prompt_once() -> None:
    executor = CacheExecutor(2)
    requests = [request(f"r{i}", [0, 1, 2, 0, i], max_tokens=9) for i in range(3)]
    core = make_core(executor, num_blocks=9)
    for each in requests:
        core.add(each)
    cached: dict[str, set[int]] = {}
    while core.has_work:
        for event in core.step():
            cached.setdefault(event.request_id, set()).add(event.num_cached_tokens)
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert cached == {"r0": {0}, "r1": {4}, "r2": {4}}
    assert (stats.prompt_tokens, stats.prefix_cache_queries, stats.prefix_cache_hits) == (15, 15, 8)


def test_a_failed_step_is_not_found_later_and_takes_no_one_else_along() -> None:
    executor = CacheExecutor(4)
    core = make_core(executor, num_blocks=20, max_num_seqs=2)
    ids = [i % 3 for i in range(18)]
    core.add(request("before", ids[:9], max_tokens=1))
    core.step()
    for name in ("a", "b", "later"):
        core.add(request(name, ids, max_tokens=1))
    executor.fail_next = True
    failed = core.step()
    assert [(event.request_id, event.finish_reason) for event in failed] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    (event,) = core.step()
    assert (event.request_id, event.num_cached_tokens) == ("later", 8)  # what "before" left, nothing of a and b
    assert list(event.token_ids) == expected_answer(request("later", ids, max_tokens=1), 80)
    assert core.stats().num_free_blocks == 20


def test_a_scored_prompt_that_is_preempted_half_way_is_scored_once() -> None:
    executor = CacheExecutor(1)
    prompt = [0, 1, 2, 0]
    requests = [request("first", [0], max_tokens=4), request("scored", prompt, max_tokens=1, prompt_logprobs=0)]
    events = run(executor, requests, num_blocks=5, max_num_batched_tokens=2)
    starts = [chunk.start for plan in executor.plans for chunk in plan.chunks if chunk.sequence.num_prompt == 4]
    assert starts.count(0) > 1, "it was not preempted"
    assert events["scored"][0].prompt_logprobs == tuple(score(prompt[p], p) for p in (1, 2, 3))
