"""Forbidden experts, a K of each row's own, min-p: against a loop, for every router that has no capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.routing.base import GateOutput, Router
from engine.routing.noisy_topk import NoisyTopK
from engine.routing.topk_softmax import TopKSoftmax
from engine.types import Steering
from tests.engine.routing import slow
from tests.engine.routing.inputs import make_inputs

LAYERS = 3
MODEL_TOP_K = 2


@st.composite
def steerings(draw: st.DrawFn, num_experts: int) -> Steering | None:
    """None or any steering that leaves an expert in every layer."""
    if draw(st.booleans()):
        return None
    everywhere = draw(st.lists(st.integers(0, num_experts - 1), max_size=num_experts - 2, unique=True))
    spared = draw(st.sampled_from([expert for expert in range(num_experts) if expert not in everywhere]))
    forbidden: list[tuple[int | None, tuple[int, ...]]] = [(None, tuple(everywhere))]
    for layer in range(LAYERS):
        here = draw(st.lists(st.integers(0, num_experts - 1), max_size=num_experts))
        forbidden.append((layer, tuple(expert for expert in here if expert != spared)))
    return Steering(
        experts_per_token=draw(st.none() | st.integers(1, num_experts)),
        forbidden=tuple(forbidden),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.3, 0.5, 0.9, 1.0])),
    )


def expected_row(
    logits: list[float], steering: Steering | None, layer: int, *, renormalize: bool
) -> tuple[list[int], list[float]]:
    steering = steering or Steering()
    forbidden = {expert for where, experts in steering.forbidden if where in (None, layer) for expert in experts}
    masked = [-torch.inf if expert in forbidden else logit for expert, logit in enumerate(logits)]
    probabilities = slow.softmax(masked)
    chosen = [e for e in slow.best(masked, steering.experts_per_token or MODEL_TOP_K) if e not in forbidden]
    most = probabilities[chosen[0]]
    chosen = [expert for expert in chosen if probabilities[expert] >= steering.min_p * most]
    total = sum(probabilities[expert] for expert in chosen) if renormalize else 1.0
    return chosen, [probabilities[expert] / total for expert in chosen]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), st.integers(2, 9), st.booleans())
def test_steering_equals_a_loop(data: st.DataObject, num_experts: int, renormalize: bool) -> None:
    """Gates are multiples of 1/4: ties are frequent, and no ratio of probabilities comes near a min-p but 1."""
    rows = data.draw(st.lists(steerings(num_experts), min_size=1, max_size=6))
    gates = st.lists(st.integers(-8, 8), min_size=num_experts, max_size=num_experts)
    logits = [[value / 4 for value in data.draw(gates)] for _ in rows]
    inputs = make_inputs(rows, num_experts=num_experts, top_k=MODEL_TOP_K, num_layers=LAYERS)
    routers: list[Router] = [TopKSoftmax(num_experts, renormalize)]
    if renormalize:
        routers.append(NoisyTopK(num_experts, draws=False))
    for layer in range(LAYERS):
        for router in routers:
            routing = router(GateOutput(torch.tensor(logits), None), layer, inputs)
            assert torch.equal(routing.chosen_ids, routing.expert_ids)
            assert routing.logits.tolist() == logits, "the record wants them as the gate gave them"
            assert routing.expert_ids.shape == routing.weights.shape == (len(rows), inputs.max_top_k)
            for token, steering in enumerate(rows):
                chosen, weights = expected_row(logits[token], steering, layer, renormalize=renormalize)
                unused = inputs.max_top_k - len(chosen)
                assert routing.expert_ids[token].tolist() == chosen + [-1] * unused
                assert routing.weights[token].tolist() == pytest.approx(weights + [0.0] * unused, rel=1e-5)


def route_one(logits: list[float], **steering: Any) -> tuple[list[int], list[float]]:
    inputs = make_inputs([Steering(**steering)], num_experts=len(logits), top_k=MODEL_TOP_K)
    routing = TopKSoftmax(len(logits), renormalize=True)(GateOutput(torch.tensor([logits]), None), 0, inputs)
    return routing.expert_ids[0].tolist(), [round(weight, 4) for weight in routing.weights[0].tolist()]


def test_min_p_comes_after_top_k_and_before_renormalising() -> None:
    """Probabilities 4/8, 2/8, 1/8, 1/8."""
    logits = [torch.tensor(share).log().item() for share in (4.0, 2.0, 1.0, 1.0)]
    assert route_one(logits, experts_per_token=3) == ([0, 1, 2], [0.5714, 0.2857, 0.1429])
    assert route_one(logits, experts_per_token=3, min_p=0.4) == ([0, 1, -1], [0.6667, 0.3333, 0.0])
    assert route_one(logits, experts_per_token=3, min_p=0.6) == ([0, -1, -1], [1.0, 0.0, 0.0])
    assert route_one(logits, experts_per_token=1, min_p=0.1) == ([0], [1.0])


def test_min_p_is_measured_on_those_that_are_allowed() -> None:
    """Without expert 0 the best has 2/4: 1/4 is half of it."""
    logits = [torch.tensor(share).log().item() for share in (4.0, 2.0, 1.0, 1.0)]
    forbidden = ((None, (0,)),)
    assert route_one(logits, forbidden=forbidden, min_p=0.49) == ([1, 2], [0.6667, 0.3333])
    assert route_one(logits, forbidden=forbidden, min_p=0.51) == ([1, -1], [1.0, 0.0])


def test_fewer_allowed_than_asked_for() -> None:
    assert route_one([1.0, 1.0, 5.0], experts_per_token=3, forbidden=((None, (2,)),)) == ([0, 1, -1], [0.5, 0.5, 0.0])


def test_an_allowed_expert_without_any_probability_is_chosen_and_a_forbidden_one_is_not() -> None:
    """exp(-200) is 0 in float32; a K of 3 is still 3."""
    logits = [200.0, 0.0, -1.0, 0.0]
    assert route_one(logits, experts_per_token=3, forbidden=((None, (1,)),)) == ([0, 2, 3], [1.0, 0.0, 0.0])
    assert route_one(logits, experts_per_token=4) == ([0, 1, 2, 3], [1.0, 0.0, 0.0, 0.0])
    assert route_one(logits, experts_per_token=3, min_p=1e-6) == ([0, -1, -1], [1.0, 0.0, 0.0])


def test_gates_that_are_not_numbers_choose_nobody() -> None:
    """A hidden state that overflowed: its row is lost, the others are not touched."""
    logits = torch.tensor([[torch.nan] * 3, [1.0, 2.0, 0.0], [torch.inf, 0.0, 0.0]])
    inputs = make_inputs([None] * 3, num_experts=3, top_k=2)
    routing = TopKSoftmax(3, renormalize=True)(GateOutput(logits, None), 0, inputs)
    assert routing.expert_ids.tolist() == [[-1, -1], [1, 0], [-1, -1]]
