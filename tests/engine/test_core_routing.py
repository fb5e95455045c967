"""Routing through EngineCore: a pattern known beforehand, and steering in mixed batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine import runner
from engine.core import EngineCore
from engine.types import ExpertVisits, LayerRouting, Request, SamplingParams, Steering
from tests.engine.cores import greedy, make_core, run, traces
from tests.engine.routing.handmade import (
    ENTROPY,
    EXPERTS,
    LAYERS,
    chosen,
    following,
    probabilities,
)

Rows = list[tuple[int, Steering | None]]
"""The tokens that one step computes, and how their requests steer."""


def counts(layer: int, rows: Rows) -> list[int]:
    experts = [expert for token, steering in rows for expert in chosen(layer, token, steering)]
    return [experts.count(expert) for expert in range(EXPERTS)]


def check_layer(actual: LayerRouting, layer: int, steps: list[Rows]) -> None:
    """The figures of a layer, from what each step's tokens choose by hand."""
    rows = [row for step in steps for row in step]
    loads = counts(layer, rows)
    assert actual.assigned == actual.dispatched == tuple(loads)
    assert actual.dropped == 0
    mean = sum(loads) / EXPERTS
    assert actual.max_over_mean == pytest.approx(max(loads) / mean)
    spread = math.sqrt(sum((load - mean) ** 2 for load in loads) / EXPERTS)
    assert actual.coefficient_of_variation == pytest.approx(spread / mean)
    assert actual.entropy == pytest.approx(ENTROPY, rel=1e-5)
    assert actual.entropy_share == pytest.approx(ENTROPY / math.log(EXPERTS), rel=1e-5)
    shares = [sum(probabilities(layer, token)[e] for token, _ in rows) / len(rows) for e in range(EXPERTS)]
    assert actual.mean_probability == pytest.approx(shares, rel=1e-5)
    loss = EXPERTS * sum(load / sum(loads) * share for load, share in zip(loads, shares, strict=True))
    assert actual.auxiliary_loss == pytest.approx(loss, rel=1e-5)
    hits = sum(1 for step in steps for load in counts(layer, step) if load)
    assert actual.effective_batch == pytest.approx(sum(loads) / hits)
    assert actual.distinct_experts == pytest.approx(hits / len(steps))


def check_report(core: EngineCore, steps: list[Rows]) -> None:
    report = core.expert_report()
    assert (report.router, report.num_experts, report.num_experts_per_tok) == ("topk_softmax", EXPERTS, 2)
    assert (report.capacity_factor, report.simulation) == (None, None)
    assert report.window == report.total
    assert (report.total.tokens, report.total.steps) == (sum(map(len, steps)), len(steps))
    for layer in range(LAYERS):
        check_layer(report.total.layers[layer], layer, steps)
    for factor in (0.5, 1.0, 1.25, 1.9):
        expected = [[0.0] * EXPERTS for _ in range(LAYERS)]
        for step in steps:
            room = math.ceil(factor * 2 * len(step) / EXPERTS)
            for layer in range(LAYERS):
                for expert, load in enumerate(counts(layer, step)):
                    expected[layer][expert] += max(0, load - room)
        answer = core.capacity_what_if(factor)
        assert [list(row) for row in answer.window_overflow] == expected
        assert answer.window_steps == len(steps)
        assert answer.window_assigned == answer.total_assigned == sum(len(counts_of(step)) for step in steps)
        assert answer.total_capacity_factor == factor
        assert answer.total_overflow == answer.window_overflow


def counts_of(rows: Rows) -> list[int]:
    return [e for layer in range(LAYERS) for token, steering in rows for e in chosen(layer, token, steering)]


def test_a_known_pattern_is_reported_exactly(handmade: Path) -> None:
    """Ten prompt tokens in chunks of four, then one token a step."""
    core = make_core(handmade, record_routing=True, max_num_batched_tokens=4)
    prompt = [3, 4, 5, 6, 30, 20, 9, 9, 2, 1]
    events = run(core, greedy("a", prompt, 7))["a"]
    assert [token for event in events for token in event.token_ids] == following(1, 7)
    chunks = [prompt[:4], prompt[4:8], prompt[8:], *([token] for token in following(1, 6))]
    check_report(core, [[(token, None) for token in chunk] for chunk in chunks])


def test_a_known_pattern_of_steered_requests(handmade: Path) -> None:
    core = make_core(handmade, record_routing=True)
    steerings = {
        "plain": None,
        "one": Steering(experts_per_token=1),
        "all": Steering(experts_per_token=EXPERTS),
        "masked": Steering(forbidden=((None, (0,)), (1, (1, 3)))),
        "likely": Steering(experts_per_token=3, min_p=0.3),
    }
    prompts = {"plain": [1, 2, 3], "one": [17, 4], "all": [0], "masked": [5, 6, 7, 30], "likely": [25, 8]}
    events = run(core, *(greedy(name, prompts[name], 4, steering) for name, steering in steerings.items()))
    steps: list[Rows] = [[(token, steerings[name]) for name in steerings for token in prompts[name]]]
    steps += [[(following(prompts[name][-1], 4)[i], steerings[name]) for name in steerings] for i in range(3)]
    check_report(core, steps)
    for name, steering in steerings.items():
        assert [token for event in events[name] for token in event.token_ids] == following(prompts[name][-1], 4)
        computed = [*prompts[name], *following(prompts[name][-1], 3)]
        visits = sum(len(chosen(layer, token, steering)) for layer in range(LAYERS) for token in computed)
        expected = None if steering is None else ExpertVisits(visits, len(computed))
        assert events[name][-1].expert_visits == expected
    assert events["masked"][-1].expert_visits == ExpertVisits(7 * 2 + 7 * 1, 7), "layer 1 has only expert 2 left"


def test_visits_are_counted_from_the_first_event_on(handmade: Path) -> None:
    core = make_core(handmade, record_routing=True, max_num_batched_tokens=4)
    events = run(core, greedy("a", [1] * 6, 3, Steering(experts_per_token=3)))["a"]
    assert [event.expert_visits for event in events] == [ExpertVisits(n * 3 * LAYERS, n) for n in (6, 7, 8)]
    unrecorded = make_core(handmade)
    assert run(unrecorded, greedy("a", [1], 1, Steering(experts_per_token=1)))["a"][-1].expert_visits is None


def test_reset_starts_anew(handmade: Path) -> None:
    core = make_core(handmade, record_routing=True)
    run(core, greedy("a", [1, 2, 3], 5))
    until_now = core.expert_report()
    assert core.reset_experts() == until_now
    report = core.expert_report()
    assert (report.total.tokens, report.total.steps, report.window.tokens) == (0, 0, 0)
    run(core, greedy("b", [7, 8], 1))
    check_report(core, [[(7, None), (8, None)]])


def test_what_the_prefix_cache_skipped_is_not_counted(handmade: Path) -> None:
    core = make_core(handmade, record_routing=True)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    run(core, greedy("a", prompt, 1))
    core.reset_experts()
    events = run(core, greedy("b", prompt, 1))["b"]
    assert events[0].num_cached_tokens == 8
    check_report(core, [[(9, None), (10, None)]])
    core.reset_experts()
    assert run(core, greedy("c", prompt, 1, Steering(experts_per_token=1)))["c"][0].num_cached_tokens == 0


@pytest.mark.parametrize("budget", [2048, 3])
def test_recomputed_tokens_are_counted_and_said_to_be(handmade: Path, budget: int) -> None:
    """Room for 32 tokens, and two sequences of 20: the second one is thrown out and begins again, in pieces if need
    be."""
    core = make_core(
        handmade, record_routing=True, num_blocks=8, max_num_batched_tokens=budget, enable_prefix_caching=False
    )
    run(core, greedy("a", [1] * 4, 16), greedy("b", [2] * 4, 16))
    stats, report = core.stats(), core.expert_report()
    assert stats.num_preemptions == 1
    assert stats.recomputed_tokens == report.recomputed_tokens > 4
    assert report.total.tokens == 2 * (4 + 15) + stats.recomputed_tokens
    core.reset_experts()
    assert core.expert_report().recomputed_tokens == 0
    assert core.stats().recomputed_tokens == stats.recomputed_tokens


def test_a_step_that_ran_out_of_memory_is_not_counted(handmade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that could not be finished nothing counts, though its layers were computed."""

    def no_room(*_: object) -> None:
        raise MemoryError("no room for the vocabulary")

    core = make_core(handmade, record_routing=True)
    monkeypatch.setattr(runner, "sample", no_room)
    (event,) = run(core, greedy("a", [1, 2, 3], 2))["a"]
    assert event.error is not None
    monkeypatch.undo()
    assert core.expert_report().total.tokens == 0
    run(core, greedy("b", [7, 8], 1))
    check_report(core, [[(7, None), (8, None)]])


# Routing in one batch and alone -------------------------------------------------------------------------------------

MIXED: dict[str, Steering | None] = {
    "plain": None,
    "one": Steering(experts_per_token=1),
    "two": Steering(experts_per_token=2),
    "all": Steering(experts_per_token=5),
    "masked": Steering(forbidden=((None, (1,)), (0, (0, 2)))),
    "only one left": Steering(forbidden=((1, (0, 1, 2, 4)),), experts_per_token=5),
    "likely": Steering(experts_per_token=4, min_p=0.4),
    "likeliest": Steering(experts_per_token=5, min_p=1.0),
    "also plain": None,
}


def traced(name: str, index: int) -> Request:
    prompt = tuple((7 * index + 3 * place) % 97 for place in range(3 + index % 4))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3)
    return Request(
        request_id=name,
        prompt_ids=prompt,
        params=params,
        steering=MIXED[name],
        trace_routing=True,
        trace_prompt_routing=True,
    )


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(five_experts: Path, backend: str) -> None:
    def core() -> EngineCore:
        return make_core(five_experts, record_routing=True, backend=backend, num_blocks=64)

    requests = [traced(name, index) for index, name in enumerate(MIXED)]
    batched_core = core()
    together = run(batched_core, *requests)
    assert batched_core.stats().num_steps == 4, "all of them in every step"
    for request in requests:
        name, steering = request.request_id, request.steering or Steering()
        alone = run(core(), request)[name]
        batched = together[name]
        assert [event.token_ids for event in batched] == [event.token_ids for event in alone]
        for actual, expected in zip(batched, alone, strict=True):
            assert actual.expert_visits == expected.expert_visits
            for one, other in zip(actual.logprobs or (), expected.logprobs or (), strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        for entry, by_itself in zip(traces(batched), traces(alone), strict=True):
            assert entry.expert_ids == by_itself.expert_ids
            assert entry.entropy == pytest.approx(by_itself.entropy, abs=1e-4)
            for layer in range(LAYERS):
                assert entry.weights[layer] == pytest.approx(by_itself.weights[layer], abs=1e-4)
                assert sum(entry.weights[layer]) == pytest.approx(1, abs=1e-5)
        forbidden = [
            {expert for where, experts in steering.forbidden if where in (None, layer) for expert in experts}
            for layer in range(LAYERS)
        ]
        for entry in traces(batched):
            for layer, experts in enumerate(entry.expert_ids):
                assert not forbidden[layer] & set(experts)
                most = min(steering.experts_per_token or 2, 5 - len(forbidden[layer]))
                assert len(experts) == most if steering.min_p == 0 else 1 <= len(experts) <= most
    kinds = {name: {len(experts) for entry in traces(together[name]) for experts in entry.expert_ids} for name in MIXED}
    assert len(kinds["likely"]) > 1, "min-p does drop here"
    assert kinds["likeliest"] == {1}
    assert kinds["only one left"] == {1, 5}
