"""What a request gets does not depend on who else is there: batching, preemption, prefix sharing and aborts."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import engine.batch as batches
from engine.core import EngineCore
from engine.executor import Executor, OutOfDeviceMemoryError, Step
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.scheduler import StepPlan
from engine.types import FinishReason, Request, SamplingParams, Steering, TokenEvent, TokenLogprobs
from tests.engine.cores import make_core
from tests.tiny import write_tiny_mixtral

VOCAB = 97
CLOSE = 1e-3  # two logits nearer than this may swap when the batch changes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_mixtral(folder, vocab_size=VOCAB, num_experts=5, num_heads=6, max_position_embeddings=8192, seed=3)
    return folder


@dataclass
class Output:
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    error: str | None = None


def collect(outputs: dict[str, Output], events: list[TokenEvent]) -> None:
    for event in events:
        output = outputs[event.request_id]
        assert output.finish_reason is None, "an event after the last one"
        output.token_ids += event.token_ids
        output.logprobs += event.logprobs or ()
        output.finish_reason = event.finish_reason
        output.num_cached = event.num_cached_tokens
        output.error = event.error


def run(core: EngineCore, requests: list[Request], *, max_steps: int = 5000) -> dict[str, Output]:
    outputs: dict[str, Output] = defaultdict(lambda: Output([], []))
    for request in requests:
        core.add(request)
    for _ in range(max_steps):
        if not core.has_work:
            return outputs
        collect(outputs, core.step())
    raise AssertionError("the requests do not finish")


def greedy(request_id: str, ids: list[int], max_tokens: int | None, **fields: object) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)
    return Request(request_id=request_id, prompt_ids=tuple(ids), params=replace(params, **fields))  # type: ignore[arg-type]


def mixed_requests(rng: random.Random) -> list[Request]:
    """24 requests of 1 to 60 prompt tokens; a third begin with the same 21 tokens."""
    prefix = [rng.randrange(VOCAB) for _ in range(21)]
    requests = []
    for index in range(24):
        ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 3, 4, 5, 13, 16, 33, 60]))]
        requests.append(greedy(f"r{index}", prefix + ids if index % 3 == 0 else ids, rng.randint(1, 40)))
    return requests


def same_up_to_near_ties(alone: Output, batched: Output) -> bool:
    """Greedy tokens are equal up to the first step whose two best log probabilities are closer than CLOSE."""
    for step, (expected, actual) in enumerate(zip(alone.token_ids, batched.token_ids, strict=True)):
        (_, best), (_, second) = alone.logprobs[step].top
        if best - second < CLOSE:
            return True
        if expected != actual:
            return False
    return True


def churn(core: EngineCore, requests: list[Request], rng: random.Random) -> tuple[dict[str, Output], set[str]]:
    """Requests arrive at random steps and four of them are aborted on the way."""
    outputs: dict[str, Output] = defaultdict(lambda: Output([], []))
    arrivals: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        arrivals[rng.randrange(30)].append(request)
    doomed = {request.request_id: rng.randrange(5, 40) for request in rng.sample(requests, 4)}
    aborted = set()
    for step in range(3000):
        for request in arrivals[step]:
            core.add(request)
        for request_id, when in doomed.items():
            if when == step and outputs[request_id].finish_reason is None:
                core.abort(request_id)
                aborted.add(request_id)
        collect(outputs, core.step())
        if step > 40 and not core.has_work:
            return outputs, aborted
    raise AssertionError("the requests do not finish")


def disagreements(checkpoint: Path, seed: int) -> tuple[list[str], EngineCore]:
    rng = random.Random(seed)
    requests = mixed_requests(rng)
    core = make_core(checkpoint, num_blocks=40, max_num_batched_tokens=23, max_num_seqs=13)
    batched, aborted = churn(core, requests, rng)
    wrong = []
    for request in requests:
        if request.request_id not in aborted:
            alone = run(make_core(checkpoint, enable_prefix_caching=False), [request])[request.request_id]
            assert len(alone.token_ids) == request.params.max_tokens
            if not same_up_to_near_ties(alone, batched[request.request_id]):
                wrong.append(request.request_id)
    return wrong, core


@pytest.mark.parametrize("seed", range(3))
def test_batching_changes_nothing(checkpoint: Path, seed: int) -> None:
    wrong, core = disagreements(checkpoint, seed)
    assert wrong == []
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.num_free_blocks == stats.num_blocks == 40
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_the_batching_test_sees_a_broken_block_table(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = batches.build

    def swapped(plan: StepPlan, *, block_size: int, steering: SteeringTable, device: torch.device) -> batches.Batch:
        batch = build(plan, block_size=block_size, steering=steering, device=device)
        if batch.block_tables.shape[1] > 2:
            batch.block_tables[:, [0, 1]] = batch.block_tables[:, [1, 0]]
        return batch

    monkeypatch.setattr(batches, "build", swapped)
    rng = random.Random(0)
    requests = mixed_requests(rng)
    core = make_core(checkpoint, num_blocks=40, max_num_batched_tokens=23, max_num_seqs=13)
    batched, aborted = churn(core, requests, rng)
    monkeypatch.undo()
    alone = {
        r.request_id: run(make_core(checkpoint), [r])[r.request_id] for r in requests if r.request_id not in aborted
    }
    assert not all(same_up_to_near_ties(output, batched[request_id]) for request_id, output in alone.items())


def test_a_shared_prefix_is_computed_once(checkpoint: Path) -> None:
    rng = random.Random(1)
    prefix = [rng.randrange(VOCAB) for _ in range(1000)]
    requests = [greedy(f"r{i}", [*prefix, *(rng.randrange(VOCAB) for _ in range(7))], 8) for i in range(6)]
    with_cache = make_core(checkpoint, num_blocks=500)
    outputs = run(with_cache, requests)
    outputs |= run(with_cache, [replace(requests[0], request_id="again")])
    uncached = run(make_core(checkpoint, num_blocks=2000, enable_prefix_caching=False), requests)
    assert [outputs[f"r{i}"].num_cached for i in range(6)] == [0, 1000, 1000, 1000, 1000, 1000]
    assert outputs["again"].num_cached == 1004  # every full block but that of the last prompt token
    for request_id, output in uncached.items():
        assert output.token_ids == outputs[request_id].token_ids
        assert output.num_cached == 0
    assert outputs["again"].token_ids == uncached["r0"].token_ids
    assert with_cache.stats().prefix_cache_queries == 7 * 1007
    assert with_cache.stats().prefix_cache_hits == 5 * 1000 + 1004


def test_a_salt_and_a_steering_digest_keep_a_prefix_apart(checkpoint: Path) -> None:
    ids = list(range(40))
    core = make_core(checkpoint)
    variants = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"steering": Steering(min_p=0.5)},
        {"cache_salt": "a", "steering": Steering(min_p=0.5)},
    ]
    for index, variant in enumerate(variants):
        request = replace(greedy(f"first{index}", ids, 1), **variant)  # type: ignore[arg-type]
        assert run(core, [request])[f"first{index}"].num_cached == 0
    for index, variant in enumerate(variants):
        request = replace(greedy(f"second{index}", ids, 1), **variant)  # type: ignore[arg-type]
        assert run(core, [request])[f"second{index}"].num_cached == 36


def test_a_long_prompt_does_not_hold_up_decodes(checkpoint: Path) -> None:
    core = make_core(checkpoint, max_num_batched_tokens=16)
    outputs: dict[str, Output] = defaultdict(lambda: Output([], []))
    for index in range(3):
        core.add(greedy(f"short{index}", [index, 5], 60))
    collect(outputs, core.step())
    core.add(greedy("long", [i % VOCAB for i in range(400)], 2))
    for step in range(1, 30):
        assert outputs["long"].token_ids == []
        collect(outputs, core.step())
        assert [len(outputs[f"short{i}"].token_ids) for i in range(3)] == [step + 1] * 3
    assert run(core, [])["long"].finish_reason is FinishReason.LENGTH  # 13 tokens a step: 31 steps


def test_priority_goes_first(checkpoint: Path) -> None:
    core = make_core(checkpoint, max_num_seqs=1)
    order: list[str] = []
    for request_id, priority in (("late", 5), ("normal", 0), ("urgent", -3), ("normal2", 0)):
        core.add(replace(greedy(request_id, [1, 2, 3], 2), priority=priority))
    while core.has_work:
        order += [event.request_id for event in core.step() if event.finish_reason]
    assert order == ["urgent", "normal", "normal2", "late"]


def test_sampling_replays_after_preemption(checkpoint: Path) -> None:
    def requests() -> list[Request]:
        params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
        return [
            Request(request_id=f"r{i}", prompt_ids=(i, 9, 4), params=replace(params, seed=77, choice=i))
            for i in range(8)
        ]

    crowded = make_core(checkpoint, num_blocks=20)
    roomy = make_core(checkpoint)
    squeezed, free = run(crowded, requests()), run(roomy, requests())
    assert crowded.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0
    assert {k: o.token_ids for k, o in squeezed.items()} == {k: o.token_ids for k, o in free.items()}
    assert len({tuple(o.token_ids) for o in free.values()}) == 8


@pytest.mark.parametrize("budget", [2048, 7])
def test_prompt_logprobs_equal_generated_ones(checkpoint: Path, budget: int) -> None:
    """Scoring prompt + answer gives the log probabilities that generating the answer gave, in one chunk or many."""
    core = make_core(checkpoint, max_num_batched_tokens=budget, num_blocks=30)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    generated = run(core, [greedy("g", prompt, 20)])["g"]
    scored = Request(
        request_id="s",
        prompt_ids=(*prompt, *generated.token_ids),
        params=SamplingParams(max_tokens=0, prompt_logprobs=2, temperature=0.0),
    )
    core.add(scored)
    events: list[TokenEvent] = []
    while core.has_work:
        events += core.step()
    (event,) = events
    assert (event.token_ids, event.finish_reason, event.num_cached_tokens) == ((), FinishReason.LENGTH, 0)
    assert event.prompt_logprobs is not None
    assert [entry.token_id for entry in event.prompt_logprobs] == list(scored.prompt_ids[1:])
    for entry, expected in zip(event.prompt_logprobs[-20:], generated.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert entry.rank == 1
        assert entry.top[0][0] == entry.token_id


def test_prompt_logprobs_survive_a_preemption(checkpoint: Path) -> None:
    """A prompt that is preempted when half of it is scored is scored once."""
    core = make_core(checkpoint, num_blocks=12, max_num_batched_tokens=8, enable_prefix_caching=False)
    for index in range(2):
        core.add(greedy(f"decode{index}", [index, 3], 40))
    ids = [i * 7 % VOCAB for i in range(33)]
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    core.add(Request(request_id="late", prompt_ids=tuple(ids), params=scoring))
    entries: list[TokenLogprobs] = []
    while core.has_work:
        for event in core.step():
            entries += event.prompt_logprobs or ()
    assert core.stats().num_preemptions > 0
    assert [entry.token_id for entry in entries] == ids[1:]


class FailingExecutor:
    """Runs out of memory in the given step and is well otherwise."""

    def __init__(self, inner: Executor, step: int) -> None:
        self.inner, self.left = inner, step

    @property
    def runs_ahead(self) -> bool:
        return self.inner.runs_ahead

    def forward(self, plan: StepPlan) -> Step:
        self.left -= 1
        if self.left == 0:
            raise OutOfDeviceMemoryError("no room")
        return self.inner.forward(plan)

    def peak_memory_bytes(self) -> int:
        return 1

    def routing_record(self) -> RoutingRecord | None:
        return self.inner.routing_record()


def test_out_of_memory_fails_one_batch_and_spoils_no_cache(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    failing = EngineCore(FailingExecutor(core._executor, step=1), core.info)
    ids = list(range(40))
    outputs = run(failing, [greedy("a", ids, 5), greedy("b", ids, 5)])
    assert [outputs[r].finish_reason for r in "ab"] == [FinishReason.ERROR] * 2
    assert "out of memory" in (outputs["a"].error or "")
    assert failing.stats().num_free_blocks == failing.stats().num_blocks
    retried = run(failing, [greedy("c", ids, 5)])["c"]
    assert retried.num_cached == 0, "blocks of the failed step must not be found"
    assert retried.token_ids == run(core, [greedy("d", ids, 5)])["d"].token_ids


def test_ends(checkpoint: Path) -> None:
    core = make_core(checkpoint, num_blocks=16)
    plain = run(core, [greedy("p", [5, 6], 12)])["p"].token_ids
    stop = plain[6]
    first = plain.index(stop)
    core.add(greedy("s", [5, 6], 12, stop_token_ids=(stop,)))
    events: list[TokenEvent] = []
    while core.has_work:
        events += core.step()
    assert [t for e in events for t in e.token_ids] == plain[: first + 1]
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, stop)
    # a stop id exactly at the limit is a stop; forbidden before min_tokens
    outputs = run(core, [greedy("limit", [5, 6], first + 1, stop_token_ids=(stop,))])
    assert outputs["limit"].finish_reason is FinishReason.STOP
    outputs = run(core, [greedy("min", [5, 6], 12, stop_token_ids=(stop,), min_tokens=12)])
    assert stop not in outputs["min"].token_ids
    assert len(outputs["min"].token_ids) == 12
    # the context ends a request that set no limit
    outputs = run(core, [greedy("context", [5, 6, 7], None)])
    assert (len(outputs["context"].token_ids), outputs["context"].finish_reason) == (61, FinishReason.LENGTH)


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, vocab_size=VOCAB, max_position_embeddings=8192, seed=3, eos_token_ids=tuple(range(40)))
    core = make_core(tmp_path)
    outputs = run(core, [greedy(f"r{i}", [i], 50, ignore_eos=False) for i in range(20)])
    stopped = [o for o in outputs.values() if o.finish_reason is FinishReason.STOP]
    assert stopped
    for output in stopped:
        assert output.token_ids[-1] < 40
        assert all(token >= 40 for token in output.token_ids[:-1])
