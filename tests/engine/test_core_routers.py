"""EngineCore with other routers than Mixtral's: capacity, chance, noise gates, forced routing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.types import Request, SamplingParams, TokenEvent
from tests.engine.cores import greedy, make_core, run, traces
from tests.engine.routing.handmade import EXPERTS, LAYERS, VOCAB, chosen, write_handmade


@pytest.mark.parametrize("router", ["switch", "gshard", "noisy_topk", "topk_softmax"])
def test_a_router_for_experiments(handmade: Path, router: str) -> None:
    """Dropped assignments are counted, and what-if at the capacity in force says how many."""
    factor = None if router == "noisy_topk" else 0.75
    core = make_core(handmade, record_routing=True, router=router, capacity_factor=factor)
    top_k = 1 if router == "switch" else 2
    run(core, greedy("a", [1, 1, 1, 1, 2, 2, 17], 3), greedy("b", [1, 9, 5], 3))
    report = core.expert_report()
    assert (report.router, report.capacity_factor, report.num_experts_per_tok) == (router, factor, top_k)
    assert not core.info.enable_prefix_caching
    for layer in report.total.layers:
        assert sum(layer.assigned) == top_k * (10 + 2 * 2)
        assert layer.dropped == sum(layer.assigned) - sum(layer.dispatched)
        if router == "noisy_topk":
            assert layer.dropped == 0
    if factor is None:
        return
    overflow = core.capacity_what_if(factor).window_overflow
    assert sum(map(sum, overflow)) > 0
    for layer, over in zip(report.total.layers, overflow, strict=True):
        dropped = [one - other for one, other in zip(layer.assigned, layer.dispatched, strict=True)]
        if router == "gshard":
            assert all(one >= other for one, other in zip(dropped, over, strict=True)), "chance drops more"
        else:
            assert dropped == list(over)


def test_a_token_that_overflows_is_carried_on_by_the_residual(handmade: Path) -> None:
    """One of three tokens fits; the experts of this checkpoint give nothing, so the answer is the same."""
    core = make_core(handmade, record_routing=True, router="switch", capacity_factor=0.1)
    request = replace(greedy("a", [4, 4, 4], 1), trace_prompt_routing=True)
    (event,) = run(core, request)["a"]
    assert event.token_ids == (5,)
    assert event.prompt_routing is not None
    assert [entry.expert_ids for entry in event.prompt_routing] == [((0,), (3,)), ((), ()), ((), ())]
    assert [entry.weights for entry in event.prompt_routing[1:]] == [((), ()), ((), ())]
    assert event.prompt_routing[0].weights[0] == pytest.approx((0.6,), rel=1e-5)
    assert core.expert_report().total.layers[0].dropped == 2


@pytest.mark.parametrize("router", ["gshard", "noisy_topk"])
def test_random_routers_draw_from_the_requests_seed(five_experts: Path, router: str) -> None:
    """Preempted or not, alone or not: the same seed routes the same way, another one differently."""

    def request(name: str, seed: int) -> Request:
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, seed=seed)
        return Request(request_id=name, prompt_ids=(3, 1, 4), params=params, trace_routing=True)

    def experts(events: list[TokenEvent]) -> list[tuple[tuple[int, ...], ...]]:
        return [entry.expert_ids for entry in traces(events)]

    roomy = make_core(five_experts, record_routing=True, router=router)
    alone = {seed: experts(run(roomy, request(str(seed), seed))[str(seed)]) for seed in (1, 2)}
    assert alone[1] != alone[2]
    assert experts(run(roomy, request("again", 1))["again"]) == alone[1]
    crowded = make_core(five_experts, record_routing=True, router=router, num_blocks=8)
    together = run(crowded, request("x", 9), request("a", 1), request("b", 2))
    assert crowded.stats().num_preemptions > 0
    assert (experts(together["a"]), experts(together["b"])) == (alone[1], alone[2])


@pytest.mark.parametrize("level", [-60.0, 3.0])
def test_the_noise_gate_of_a_checkpoint_is_used(tmp_path: Path, level: float) -> None:
    """softplus of a large negative number is no noise at all, of a large one much. The router is asked for by name."""
    write_handmade(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"router_type": "noisy_topk"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(LAYERS):
        gates = torch.full((EXPERTS, VOCAB), level / math.sqrt(VOCAB))
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.noise.weight"] = gates
    save_file(tensors, tmp_path / "model.safetensors")
    core = make_core(tmp_path, record_routing=True, router="noisy_topk")
    request = replace(greedy("a", list(range(VOCAB)), 1), trace_prompt_routing=True)
    (event,) = run(core, request)["a"]
    assert event.prompt_routing is not None
    as_without = [
        entry.expert_ids == tuple(tuple(chosen(layer, token)) for layer in range(LAYERS))
        for token, entry in enumerate(event.prompt_routing)
    ]
    assert all(as_without) if level < 0 else sum(as_without) < VOCAB / 4
    quiet = make_core(tmp_path, record_routing=True)
    (event,) = run(quiet, request)["a"]
    assert event.prompt_routing is not None
    assert [entry.expert_ids for entry in event.prompt_routing] == [
        tuple(tuple(chosen(layer, token)) for layer in range(LAYERS)) for token in range(VOCAB)
    ]


@pytest.mark.parametrize("simulation", ["even", "zipf", "one"])
def test_forced_routing(handmade: Path, simulation: str) -> None:
    core = make_core(handmade, record_routing=True, routing_simulation=simulation)
    run(core, *(greedy(str(index), [index % VOCAB] * 40, 10) for index in range(10)))
    assert (core.info.router, core.info.routing_simulation) == (simulation, simulation)
    report = core.expert_report()
    assert (report.router, report.simulation) == (simulation, simulation)
    for layer in report.total.layers:
        loads = layer.assigned
        assert sum(loads) == 2 * 10 * (40 + 9)
        if simulation == "even":
            assert max(loads) - min(loads) <= report.total.steps
        elif simulation == "one":
            assert loads == (490, 490, 0, 0)
        else:
            assert list(loads) == sorted(loads, reverse=True)
            assert loads[0] > 1.5 * loads[3] > 0
