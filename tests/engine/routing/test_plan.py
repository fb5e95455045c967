"""Grouping by expert and combining: the example of the docstring, and random routings against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.routing.plan import ExpertPlan, combine, group

FEW = settings(max_examples=150, deadline=None, derandomize=True)


def routings() -> st.SearchStrategy[tuple[list[list[int]], int]]:
    """Expert ids [T][K], -1 for unused places, and the number of experts. Skewed: many experts get nothing."""

    def ids(sizes: tuple[int, int, int]) -> st.SearchStrategy[tuple[list[list[int]], int]]:
        num_tokens, num_choices, num_experts = sizes
        expert = st.one_of(st.integers(-1, num_experts - 1), st.sampled_from([-1, 0, num_experts - 1]))
        row = st.lists(expert, min_size=num_choices, max_size=num_choices)
        return st.tuples(st.lists(row, min_size=num_tokens, max_size=num_tokens), st.just(num_experts))

    return st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9)).flatmap(ids)


def check(expert_ids: list[list[int]], num_experts: int) -> ExpertPlan:
    """The plan of `expert_ids`, compared place by place with a stable sort in a loop."""
    plan = group(torch.tensor(expert_ids, dtype=torch.int32), num_experts)
    flat = [expert for row in expert_ids for expert in row]
    num_choices = len(expert_ids[0])
    order = [place for expert in [*range(num_experts), -1] for place, chosen in enumerate(flat) if chosen == expert]
    assert plan.token_indices.tolist() == [place // num_choices for place in order]
    assert plan.inverse.tolist() == [order.index(place) for place in range(len(flat))]
    starts = [sum(1 for chosen in flat if 0 <= chosen < expert) for expert in range(num_experts + 1)]
    assert plan.offsets.tolist() == starts
    return plan


def test_the_example() -> None:
    plan = check([[2, 0], [0, -1], [2, 1]], 3)
    assert plan.offsets.tolist() == [0, 2, 3, 5]
    assert plan.token_indices.tolist() == [0, 1, 2, 0, 2, 1]
    assert plan.inverse.tolist() == [3, 0, 1, 5, 4, 2]
    assert (plan.token_indices.dtype, plan.inverse.dtype) == (torch.int64, torch.int64)
    assert plan.offsets.dtype == torch.int32


@pytest.mark.parametrize(
    ("expert_ids", "num_experts"),
    [
        ([[0]], 1),
        ([[-1]], 1),
        ([[3, 1]], 8),
        ([[7, 7], [7, 7], [7, 7]], 8),
        ([[-1, -1], [-1, -1]], 4),
        ([[0, -1], [-1, 0], [0, -1]], 2),
        ([[e] for e in range(16)], 16),
        ([[e, (e + 1) % 5, (e + 2) % 5] for e in range(5)] * 40, 5),
    ],
)
def test_shapes_at_the_edge(expert_ids: list[list[int]], num_experts: int) -> None:
    check(expert_ids, num_experts)


def test_no_tokens() -> None:
    plan = group(torch.empty(0, 2, dtype=torch.int32), 3)
    assert plan.offsets.tolist() == [0, 0, 0, 0]
    assert plan.token_indices.shape == plan.inverse.shape == (0,)


@FEW
@given(routings())
def test_random_routings_equal_a_loop(routing: tuple[list[list[int]], int]) -> None:
    check(*routing)


def poisoned(values: Tensor, plan: ExpertPlan) -> Tensor:
    """`values` [T*K, D] in grouped order with NaN in the rows that belong to no expert."""
    grouped = torch.empty_like(values)
    grouped[plan.inverse] = values
    grouped[plan.offsets[-1] :] = torch.nan
    return grouped


@FEW
@given(routings(), st.integers(1, 5))
def test_combine_equals_a_loop(routing: tuple[list[list[int]], int], hidden_size: int) -> None:
    expert_ids, num_experts = torch.tensor(routing[0], dtype=torch.int32), routing[1]
    num_tokens, num_choices = expert_ids.shape
    generator = torch.Generator().manual_seed(num_tokens * 10 + num_choices)
    values = torch.randn(num_tokens * num_choices, hidden_size, generator=generator)
    weights = torch.rand(num_tokens, num_choices, generator=generator)
    plan = group(expert_ids, num_experts)
    expected = torch.zeros(num_tokens, hidden_size)
    for token in range(num_tokens):
        for choice in range(num_choices):
            if expert_ids[token, choice] >= 0:
                expected[token] += weights[token, choice] * values[token * num_choices + choice]
    actual = combine(poisoned(values, plan), weights, expert_ids, plan)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_combine_skips_even_weighted_unused_places() -> None:
    """A dropped place is skipped, whatever its weight and whatever lies there."""
    expert_ids = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    plan = group(expert_ids, 2)
    for garbage in (torch.nan, torch.inf):
        grouped = torch.tensor([[2.0], [garbage], [garbage], [garbage]])
        assert combine(grouped, torch.full((2, 2), 0.5), expert_ids, plan).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_combine_sums_in_float32(dtype: torch.dtype) -> None:
    """256 + 0.5 + 0.5 is 256 when every sum is rounded to eight bits; 2048 + 0.5 + 0.5 when to eleven."""
    large = 256.0 if dtype == torch.bfloat16 else 2048.0
    expert_ids = torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.int32)
    plan = group(expert_ids, 5)
    grouped = torch.tensor([[large], [0.5], [0.5], [0.5], [0.5]], dtype=dtype)
    result = combine(grouped, torch.ones(1, 5), expert_ids, plan)
    assert result.dtype == dtype
    assert result.item() == large + 2


def test_equal_batches_give_equal_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.randint(-1, 6, (101, 3), generator=generator, dtype=torch.int32)
    values = torch.randn(303, 17, generator=generator)
    weights = torch.rand(101, 3, generator=generator)
    results = [combine(values, weights, expert_ids, group(expert_ids, 6)) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
