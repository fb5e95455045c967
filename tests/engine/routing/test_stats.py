"""What the sums of a record say, against numpy over the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.routing import record as records
from engine.routing.record import capacity_factors
from engine.routing.stats import stats, what_if
from engine.types import RoutingStats
from tests.engine.routing import slow
from tests.engine.routing.steps import EXPERTS, LAYERS, TOP_K, Counts, Step, added, make_record, make_steps, recorded


def check_stats(actual: RoutingStats, steps: Sequence[Step]) -> None:
    assigned = added(step.counts(step.chosen_ids) for step in steps)
    dispatched = added(step.counts(step.expert_ids) for step in steps)
    hits = added((step.counts(step.expert_ids) > 0).astype(int) for step in steps)
    probabilities = np.concatenate([step.probabilities() for step in steps], axis=1)
    assert (actual.tokens, actual.steps) == (probabilities.shape[1], len(steps))
    for layer, figures in enumerate(actual.layers):
        loads = assigned[layer]
        assert figures.assigned == tuple(loads)
        assert figures.dispatched == tuple(dispatched[layer])
        assert figures.dropped == loads.sum() - dispatched[layer].sum()
        assert figures.max_over_mean == pytest.approx(loads.max() / loads.mean())
        assert figures.coefficient_of_variation == pytest.approx(np.std(loads) / np.mean(loads))
        rows = probabilities[layer]
        entropy = float(np.mean([-(row * np.log(row)).sum() for row in rows]))
        assert figures.entropy == pytest.approx(entropy)
        assert figures.entropy_share == pytest.approx(entropy / math.log(EXPERTS))
        assert figures.mean_probability == pytest.approx(rows.mean(0))
        shares = loads / loads.sum()
        assert figures.auxiliary_loss == pytest.approx(EXPERTS * (shares * rows.mean(0)).sum())
        assert figures.effective_batch == pytest.approx(dispatched[layer].sum() / hits[layer].sum())
        assert figures.distinct_experts == pytest.approx(hits[layer].sum() / len(steps))


def test_figures_equal_numpy() -> None:
    steps = make_steps(40, seed=1)
    record = recorded(steps)
    check_stats(stats(record.total()), steps)
    check_stats(stats(record.window()), steps)


def test_figures_of_perfect_balance_and_of_none() -> None:
    """Four rows take experts in turn; then all of them the same two."""
    even = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]], dtype=torch.int32).expand(LAYERS, 5, 2)
    flat = torch.zeros(LAYERS, 5, EXPERTS)
    figures = stats(recorded([Step(5, flat, even, even)]).snapshot().total).layers[0]
    assert (figures.max_over_mean, figures.coefficient_of_variation) == (1.0, 0.0)
    assert figures.entropy_share == pytest.approx(1.0)
    assert figures.auxiliary_loss == pytest.approx(1.0)
    assert (figures.effective_batch, figures.distinct_experts) == (2.0, 5.0)
    same = torch.tensor([3, 1], dtype=torch.int32).expand(LAYERS, 5, 2)
    peaked = torch.full((LAYERS, 5, EXPERTS), -torch.inf)
    peaked[..., 3] = 0.0
    figures = stats(recorded([Step(5, peaked, same, same)]).snapshot().total).layers[0]
    assert figures.max_over_mean == 2.5
    assert figures.coefficient_of_variation == pytest.approx(math.sqrt(1.5))
    assert figures.entropy == 0.0
    assert figures.auxiliary_loss == pytest.approx(2.5)
    assert (figures.effective_batch, figures.distinct_experts) == (5.0, 2.0)


def test_an_empty_record_has_figures() -> None:
    record = make_record()
    snapshot = record.snapshot()
    assert snapshot.window.tokens.shape == (0,)
    for figures in (stats(record.total()), stats(record.window())):
        assert (figures.tokens, figures.steps, figures.pooled_auxiliary_loss) == (0, 0, 0.0)
        assert all(math.isfinite(value) for layer in figures.layers for value in (layer.entropy, layer.auxiliary_loss))
        assert figures.layers[0].assigned == (0,) * EXPERTS
    answer = what_if(snapshot, 1.0)
    assert (answer.window_steps, answer.window_assigned, answer.total_assigned) == (0, 0, 0)
    assert answer.window_overflow == answer.total_overflow == ((0,) * EXPERTS,) * LAYERS


FACTORS = [0.01, 0.125, 0.3, 0.5, 1.0, 1.23, 1.25, 1.7, 2.0, 2.5, 5.0, 100.0, 1e300]


def overflow(steps: Sequence[Step], factor: float) -> Counts:
    """The sum over `steps` of max(0, n - ceil(factor * K * T / E))."""
    return added(
        np.maximum(0, step.counts(step.chosen_ids) - float(slow.limit(factor, TOP_K, step.num_valid, EXPERTS)))
        for step in steps
    )


@pytest.mark.parametrize("factor", FACTORS)
def test_what_if_is_exact_over_the_window(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "WINDOW_STEPS", 20)
    steps = make_steps(33, seed=6)
    answer = what_if(recorded(steps).snapshot(), factor)
    assert (np.array(answer.window_overflow) == overflow(steps[13:], factor)).all()
    assert (answer.capacity_factor, answer.window_steps) == (factor, 20)
    assert answer.window_assigned == added(step.counts(step.chosen_ids) for step in steps[13:]).sum()
    assert answer.total_assigned == added(step.counts(step.chosen_ids) for step in steps).sum()


def test_what_if_since_the_start_is_exact_for_twentieths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long after the window has moved on. Every factor finds itself in the table."""
    monkeypatch.setattr(records, "WINDOW_STEPS", 5)
    steps = make_steps(80, seed=7)
    snapshot = recorded(steps).snapshot()
    for twentieths in range(1, 81):
        answer = what_if(snapshot, twentieths / 20)
        assert answer.total_capacity_factor == twentieths / 20
        assert (np.array(answer.total_overflow) == overflow(steps, twentieths / 20)).all()
    assert capacity_factors().tolist() == [twentieths / 20 for twentieths in range(1, 81)]


@pytest.mark.parametrize(
    ("factor", "named"),
    [
        (0.01, 0.05),
        (0.0999, 0.05),
        (0.33, 0.3),
        (1.249999, 1.2),
        (1.2500001, 1.25),
        (3.99, 3.95),
        (7.0, 4.0),
        (1e300, 4.0),
    ],
)
def test_what_if_since_the_start_names_the_factor_that_it_is_exact_for(factor: float, named: float) -> None:
    steps = make_steps(80, seed=8)
    answer = what_if(recorded(steps).snapshot(), factor)
    assert answer.total_capacity_factor == named
    assert (np.array(answer.total_overflow) == overflow(steps, named)).all()
    if named < factor:
        assert (np.array(answer.total_overflow) >= overflow(steps, factor)).all()
