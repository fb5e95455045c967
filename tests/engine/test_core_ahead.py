"""Steps that begin before the one before is told: the same answers, and nothing foreseeable computed in vain.

The random runs are in test_scheduler_model.py.
"""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.types import FinishReason, Request, SamplingParams
from tests.engine.cache_executor import VOCAB_SIZE, CacheExecutor, expected_answer, make_core

BLOCKS, SIZE = 32, 4
CONTEXT = BLOCKS * SIZE


def make_request(name: str, length: int, max_tokens: int | None, stop: tuple[int, ...] = ()) -> Request:
    prompt = tuple(index * 7 // 3 % VOCAB_SIZE for index in range(length))
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    return Request(request_id=name, prompt_ids=prompt, params=params)


def serve(*requests: Request, ahead: bool, one_by_one: bool = False) -> tuple[dict[str, list[int]], EngineCore, int]:
    """Answers, the core, and how many tokens were computed."""
    executor = CacheExecutor(SIZE, runs_ahead=ahead)
    core = make_core(executor, num_blocks=BLOCKS, max_num_seqs=4, max_num_batched_tokens=16)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for group in [[request] for request in requests] if one_by_one else [list(requests)]:
        for request in group:
            core.add(request)
        while core.has_work:
            for event in core.step():
                assert event.finish_reason is not FinishReason.ERROR
                answers[event.request_id] += event.token_ids
    for request in requests:
        assert answers[request.request_id] == expected_answer(request, CONTEXT)
    return answers, core, executor.num_computed


@pytest.mark.parametrize("max_tokens", [1, 2, 9, None])
def test_an_end_by_length_is_foreseen(max_tokens: int | None) -> None:
    requests = [make_request("a", 5, max_tokens), make_request("b", 21, 3)]
    *_, computed = serve(*requests, ahead=True)
    assert computed == serve(*requests, ahead=False)[2]


def test_another_end_costs_one_row() -> None:
    request = make_request("a", 6, 60, stop=(2,))
    answers, _, computed = serve(request, ahead=True)
    assert answers["a"][-1] == 2
    assert computed == serve(request, ahead=False)[2] + 1


def test_decodes_advance_in_every_step() -> None:
    executor = CacheExecutor(SIZE, runs_ahead=True)
    core = make_core(executor, num_blocks=BLOCKS)
    core.add(make_request("a", 3, 8))
    assert core.step() == []
    assert [len(core.step()) for _ in range(8)] == [1] * 8
    assert not core.has_work
    assert len(executor.plans) == 8


def test_the_prefix_cache_finds_as_much() -> None:
    """Blocks that end with a pending token become known a step later."""
    requests = [make_request(str(length), length, 6) for length in (9, 30, 14, 33)]
    cores = [serve(*requests, ahead=ahead, one_by_one=True)[1] for ahead in (True, False)]
    hits = [core.stats().prefix_cache_hits for core in cores]
    assert hits[0] == hits[1] > 0
    first = make_request("a", 7, 10)
    answer = expected_answer(first, CONTEXT)
    longer = (*first.prompt_ids, *answer)
    again = Request(request_id="b", prompt_ids=longer, params=SamplingParams(max_tokens=1))
    hits = [serve(first, again, ahead=ahead, one_by_one=True)[1].stats().prefix_cache_hits for ahead in (True, False)]
    assert hits == [16, 16]


def test_an_abort_between_steps_is_no_answer() -> None:
    executor = CacheExecutor(SIZE, runs_ahead=True)
    core = make_core(executor, num_blocks=BLOCKS)
    core.add(make_request("a", 3, 8))
    core.step()
    core.abort("a")
    assert (core.has_work, core.step(), core.has_work) == (True, [], False), "the step was still under way"
    assert core.stats().num_free_blocks == BLOCKS


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_step_leaves_nothing_for_others_to_find(ahead: bool) -> None:
    """One takes as its beginning what another publishes in the same step, and counts it as computed."""
    executor = CacheExecutor(SIZE, runs_ahead=ahead)
    core = make_core(executor, num_blocks=BLOCKS)
    for name, last in (("a", 1), ("b", 2)):
        core.add(Request(request_id=name, prompt_ids=(0, 1, 2, 0, last), params=SamplingParams(max_tokens=2)))
    executor.fail_next = True
    assert [event.finish_reason for event in core.step()] == [FinishReason.ERROR] * 2
    assert len(executor.plans[0].chunks) == 2
    assert executor.plans[0].chunks[1].start == SIZE
    core.add(Request(request_id="c", prompt_ids=(0, 1, 2, 0, 0), params=SamplingParams(max_tokens=2)))
    while core.has_work:
        core.step()
    assert core.stats().prefix_cache_hits == SIZE, "of b alone"
