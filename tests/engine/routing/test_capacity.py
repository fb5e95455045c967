"""Switch, GShard and top-K with a capacity, against loops over the papers' algorithms."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.routing.base import GateOutput, Router, Routing
from engine.routing.capacity import capacity, within_capacity
from engine.routing.gshard import GShard
from engine.routing.switch import Switch
from engine.routing.topk_softmax import TopKSoftmax
from engine.types import Steering
from tests.engine.routing import slow
from tests.engine.routing.inputs import make_inputs, route

FACTORS = [None, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 100.0]
POSITION = 17

# Gates [T][E] beside random ones.
SPECIAL: dict[str, list[list[float]]] = {
    "one token": [[0.25, 1.0, -1.0]],
    "one token, all equal": [[0.0, 0.0, 0.0, 0.0]],
    "all equal": [[0.5] * 5] * 9,
    "everybody to one expert": [[0.0, 0.0, 4.0, 1.0]] * 11,
    "everybody to one pair, either way round": [[2.0, 1.75, 0.0], [1.75, 2.0, 0.0]] * 6,
    "two experts": [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]] * 3,
    "first choices of some are second choices of others": [[3.0, 2.0, 0.0], [0.0, 3.0, 2.0], [2.0, 0.0, 3.0]] * 3,
}


def check(routing: Routing, expected: list[slow.Row]) -> None:
    """The valid rows are as expected; rows beyond them are padding, and go nowhere."""
    num_valid = len(expected)
    assert routing.chosen_ids[:num_valid].tolist() == [row.chosen for row in expected]
    assert routing.expert_ids[:num_valid].tolist() == [row.expert_ids() for row in expected]
    for actual, row in zip(routing.weights.tolist(), expected, strict=False):
        assert actual == pytest.approx(row.kept_weights(), rel=1e-5)
    assert (routing.weights[routing.expert_ids < 0] == 0).all()


def check_switch(logits: list[list[float]], factor: float | None, num_padding: int = 0) -> None:
    padded = torch.tensor(logits + [[9.0] + [0.0] * (len(logits[0]) - 1)] * num_padding)
    routing = route(Switch(factor), padded, 1, num_valid=len(logits))
    check(routing, slow.switch(logits, factor))
    if factor is not None:
        assert (routing.expert_ids[len(logits) :] == -1).all()


def check_gshard(logits: list[list[float]], factor: float | None, seed: int, num_padding: int = 0) -> None:
    padded = torch.tensor(logits + [[9.0, 8.0] + [0.0] * (len(logits[0]) - 2)] * num_padding)
    seeds = [seed + token for token in range(len(padded))]
    routing = route(GShard(factor), padded, 2, num_valid=len(logits), seeds=seeds, positions=[POSITION] * len(padded))
    draws = [slow.uniform(seeds[token], POSITION, 0, 1) for token in range(len(logits))]
    check(routing, slow.gshard(logits, factor, draws))
    if factor is not None:
        assert (routing.expert_ids[len(logits) :] == -1).all()


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_gates(name: str, factor: float | None) -> None:
    for num_padding in (0, 3):
        check_switch(SPECIAL[name], factor, num_padding)
        for seed in range(3):
            check_gshard(SPECIAL[name], factor, seed * 1000, num_padding)


GATES = st.integers(2, 8).flatmap(
    lambda num_experts: st.lists(
        st.lists(st.integers(-4, 4).map(lambda value: value / 4), min_size=num_experts, max_size=num_experts),
        min_size=1,
        max_size=40,
    )
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(GATES, st.sampled_from(FACTORS), st.integers(-(2**40), 2**40), st.integers(0, 5))
def test_random_gates_equal_the_loops(
    logits: list[list[float]], factor: float | None, seed: int, num_padding: int
) -> None:
    check_switch(logits, factor, num_padding)
    check_gshard(logits, factor, seed, num_padding)


def test_many_tokens_and_skewed_experts() -> None:
    """Long enough that every branch of GShard is taken often."""
    rng = random.Random(4)
    logits = [[round(rng.gauss(1.0 if expert < 2 else 0.0, 1.0) * 8) / 8 for expert in range(8)] for _ in range(700)]
    for factor in (0.5, 1.0, 1.5):
        check_switch(logits, factor)
        check_gshard(logits, factor, 99)
    draws = [slow.uniform(99 + token, POSITION, 0, 1) for token in range(700)]
    rows = slow.gshard(logits, 1.0, draws)
    assert {tuple(row.kept) for row in rows} == {(True, True), (True, False), (False, True), (False, False)}


def test_a_weak_second_choice_is_dispatched_as_often_as_twice_its_weight() -> None:
    gates = torch.tensor([[0.0, -1.0, -9.0]]).expand(20_000, 3)
    routing = route(GShard(None), gates, 2)
    share = float((routing.expert_ids[:, 1] == 1).float().mean())
    assert share == pytest.approx(2 * 0.26894, abs=0.015)
    assert (routing.expert_ids[:, 0] == 0).all()
    even = route(GShard(None), torch.zeros(1000, 3), 2)
    assert (even.expert_ids[:, 1] == 1).all(), "2 * 0.5 is above any draw"


def test_gshard_does_not_depend_on_who_else_is_there_but_for_capacity() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 6, generator=generator)
    seeds, positions = list(range(50)), list(range(100, 150))
    together = route(GShard(None), logits, 2, seeds=seeds, positions=positions)
    for token in range(0, 50, 7):
        alone = route(GShard(None), logits[token : token + 1], 2, seeds=[token], positions=[100 + token])
        assert torch.equal(alone.expert_ids[0], together.expert_ids[token])
        assert torch.equal(alone.weights[0], together.weights[token])


def test_switch_weights_are_shares_of_the_full_softmax() -> None:
    routing = route(Switch(None), torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1)
    assert routing.weights.item() == pytest.approx(2.718282 / 5.718282, rel=1e-6)


def test_the_examples_of_the_docstring() -> None:
    """E = 2, C = 2: ceil(c * 2 * 3 / 2) with c = 0.5."""
    inputs = make_inputs([None] * 3, num_experts=2, top_k=2)

    def kept(choices: list[list[int]]) -> list[list[bool]]:
        return within_capacity(torch.tensor(choices, dtype=torch.int32), 2, 0.5, inputs).tolist()

    assert kept([[0, 1], [0, 1], [0, 1]]) == [[True, True], [True, True], [False, False]]
    assert kept([[0, 1], [1, 0], [0, 1]]) == [[True, True], [True, False], [True, False]]


@pytest.mark.parametrize(
    ("top_k", "num_experts", "factor", "num_tokens", "expected"),
    [(1, 8, 1.0, 8, 1), (1, 8, 1.0, 9, 2), (2, 8, 1.25, 32, 10), (2, 4, 0.01, 1, 1), (2, 8, 1.25, 33, 11)],
)
def test_capacities(top_k: int, num_experts: int, factor: float, num_tokens: int, expected: int) -> None:
    assert float(capacity(top_k, num_experts, factor, torch.tensor(num_tokens))) == expected
    assert float(capacity(torch.tensor(top_k), num_experts, factor, torch.tensor(num_tokens))) == expected


def test_top_k_with_a_capacity_drops_in_the_same_order() -> None:
    """GShard without chance: the loop's draws are 0, below any second choice's weight."""
    rng = random.Random(1)
    logits = [[rng.randrange(-8, 9) / 4 for _ in range(5)] for _ in range(60)]
    for factor in (0.3, 1.0, 1.6):
        routing = route(TopKSoftmax(5, renormalize=True, capacity_factor=factor), torch.tensor(logits), 2)
        check(routing, slow.gshard(logits, factor, [0.0] * 60))
        assert (routing.expert_ids < 0).any() or factor > 1


ROUTERS: dict[str, Router] = {
    "topk_softmax": TopKSoftmax(4, renormalize=True, capacity_factor=1.0),
    "gshard": GShard(1.0),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_the_capacity_is_the_models_whatever_single_requests_ask_for(name: str) -> None:
    """Six tokens, four experts, K = 2: C = 3. A K of 1 makes it no smaller, a K of 4 elsewhere no larger."""
    router = ROUTERS[name]
    gates = GateOutput(torch.tensor([[4.0, 3.9, 0.0, 0.0]]).expand(6, 4), None)

    def first_choices(steerings: list[Any]) -> list[int]:
        routing = router(gates, 0, make_inputs(steerings, num_experts=4, top_k=2))
        return routing.expert_ids[:, 0].tolist()

    one = Steering(experts_per_token=1)
    assert first_choices([None] * 6) == [0, 0, 0, -1, -1, -1]
    assert first_choices([one] * 6) == [0, 0, 0, -1, -1, -1]
    if router.max_choices == 4:
        assert first_choices([None] * 5 + [Steering(experts_per_token=4)]) == [0, 0, 0, -1, -1, -1]


def test_places_that_steering_leaves_empty_take_no_room() -> None:
    """Rows that may not have expert 0 leave it to the others: C = ceil(1 * 2 * 4 / 4) = 2."""
    gates = GateOutput(torch.tensor([[4.0, 2.0, 1.0, 0.0]]).expand(4, 4), None)
    without = Steering(forbidden=((None, (0,)),), experts_per_token=1)
    routing = TopKSoftmax(4, renormalize=True, capacity_factor=1.0)(
        gates, 0, make_inputs([without, None, without, None], num_experts=4, top_k=2)
    )
    assert routing.chosen_ids.tolist() == [[1, -1], [0, 1], [1, -1], [0, 1]]
    assert routing.expert_ids.tolist() == [[1, -1], [0, -1], [1, -1], [0, -1]]
