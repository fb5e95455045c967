"""Forced routing: the loads that it promises, whatever the gates say."""

from __future__ import annotations

import pytest
import torch

from engine.routing.base import GateOutput, Routing
from engine.routing.simulated import Simulated
from engine.types import Steering
from tests.engine.routing.inputs import make_inputs, route


def simulate(pattern: str, num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> Routing:
    """By gates that all prefer the last expert."""
    logits = torch.arange(float(num_experts)).expand(num_tokens, num_experts) * 10
    return route(
        Simulated(pattern, num_experts), logits, top_k, seeds=[seed] * num_tokens, positions=list(range(num_tokens))
    )


@pytest.mark.parametrize("pattern", ["even", "zipf", "one"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (5, 3), (4, 4), (1, 1), (7, 1)])
def test_every_token_gets_k_different_experts_of_equal_weight(pattern: str, num_experts: int, top_k: int) -> None:
    routing = simulate(pattern, 41, num_experts, top_k)
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (torch.int32, torch.float32)
    assert all(len(set(row)) == top_k and min(row) >= 0 for row in routing.expert_ids.tolist())
    torch.testing.assert_close(routing.weights, torch.full((41, top_k), 1 / top_k))
    assert torch.equal(routing.chosen_ids, routing.expert_ids)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(13, 8, 2), (1, 8, 2), (40, 5, 3), (9, 4, 4)])
def test_even_takes_experts_in_turn(num_tokens: int, num_experts: int, top_k: int) -> None:
    routing = simulate("even", num_tokens, num_experts, top_k)
    expected = [[(token * top_k + place) % num_experts for place in range(top_k)] for token in range(num_tokens)]
    assert [sorted(row) for row in routing.expert_ids.tolist()] == [sorted(row) for row in expected]
    loads = torch.bincount(routing.expert_ids.flatten(), minlength=num_experts)
    assert loads.max() - loads.min() <= 1


def test_one_sends_everybody_to_the_first_experts() -> None:
    assert simulate("one", 30, 8, 3).expert_ids.tolist() == [[0, 1, 2]] * 30


def test_zipf_loads_fall_like_one_over_the_rank() -> None:
    routing = simulate("zipf", 40_000, 6, 1)
    loads = torch.bincount(routing.expert_ids[:, 0], minlength=6).double() / 40_000
    shares = 1 / torch.arange(1, 7).double()
    torch.testing.assert_close(loads, shares / shares.sum(), rtol=0, atol=4 * 0.5 / 200)


def test_zipf_draws_without_replacement() -> None:
    """Of three experts with weights 1, 1/2, 1/3: the second is drawn among those that are left."""
    routing = simulate("zipf", 40_000, 3, 2)
    pairs = torch.bincount(routing.expert_ids[:, 0] * 3 + routing.expert_ids[:, 1], minlength=9).double() / 40_000
    weights = [6 / 11, 3 / 11, 2 / 11]
    for first in range(3):
        for second in range(3):
            expected = 0.0 if first == second else weights[first] * weights[second] / (1 - weights[first])
            assert float(pairs[first * 3 + second]) == pytest.approx(expected, abs=0.01)


def test_zipf_depends_on_the_token_alone() -> None:
    """And not on its place in the batch."""
    logits = torch.zeros(20, 6)
    seeds, positions = list(range(20)), list(range(20, 40))
    together = route(Simulated("zipf", 6), logits, 2, seeds=seeds, positions=positions)
    alone = route(Simulated("zipf", 6), logits[:1], 2, seeds=[13], positions=[33])
    assert torch.equal(alone.expert_ids[0], together.expert_ids[13])


@pytest.mark.parametrize("pattern", ["even", "zipf", "one"])
def test_steering_still_holds(pattern: str) -> None:
    steerings = [
        Steering(experts_per_token=1),
        Steering(experts_per_token=4),
        Steering(forbidden=((None, (0, 1)),)),
        Steering(min_p=1.0),
        None,
    ] * 4
    inputs = make_inputs(steerings, num_experts=4, top_k=2)
    routing = Simulated(pattern, 4)(GateOutput(torch.zeros(20, 4), None), 0, inputs)
    for row, weights, steering in zip(routing.expert_ids.tolist(), routing.weights.tolist(), steerings, strict=True):
        used = [expert for expert in row if expert >= 0]
        assert len(used) == ((steering and steering.experts_per_token) or 2), "min-p has no probabilities to go by"
        assert sum(weights) == pytest.approx(1)
        if steering is not None and steering.forbidden:
            assert set(used) == {2, 3}
