"""RoutingRecord against naive counting over the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch

from engine.routing import record as records
from engine.routing.record import WINDOW_STEPS, Sums
from engine.routing.stats import stats
from tests.engine.routing.inputs import CPU
from tests.engine.routing.steps import EXPERTS, LAYERS, Step, added, make_record, make_steps, observe, recorded


def check_sums(sums: Sums, steps: Sequence[Step]) -> None:
    assert int(sums.steps) == len(steps)
    assert int(sums.tokens) == sum(step.num_valid for step in steps)
    assert (sums.assigned.numpy() == added(step.counts(step.chosen_ids) for step in steps)).all()
    assert (sums.dispatched.numpy() == added(step.counts(step.expert_ids) for step in steps)).all()
    assert (sums.hits.numpy() == added((step.counts(step.expert_ids) > 0).astype(int) for step in steps)).all()
    probability = sum(step.probabilities().sum(1) for step in steps)
    np.testing.assert_allclose(sums.probability.numpy(), probability, rtol=1e-6)
    entropy = sum(-(step.probabilities() * np.log(step.probabilities())).sum((1, 2)) for step in steps)
    np.testing.assert_allclose(sums.entropy.numpy(), entropy, rtol=1e-6)


def test_sums_equal_counting_row_by_row() -> None:
    steps = make_steps(60)
    record = recorded(steps)
    check_sums(record.total(), steps)
    check_sums(record.window(), steps)
    snapshot = record.snapshot()
    check_sums(snapshot.total, steps)
    for index, step in enumerate(steps):
        check_sums(Sums(*(tensor[index] for tensor in snapshot.window.tensors())), [step])


def test_padding_and_stale_rows_are_never_counted() -> None:
    """Rows beyond the valid ones hold what the last step left, or were never written: NaN for once."""
    wide, narrow = make_steps(200, seed=3)[7], make_steps(200, seed=3)[8]
    record = recorded([wide, narrow])
    poisoned = Step(
        1,
        torch.cat((narrow.logits[:, :1], torch.full((LAYERS, 4, EXPERTS), torch.nan)), dim=1),
        torch.cat((narrow.expert_ids[:, :1], torch.zeros(LAYERS, 4, narrow.max_top_k, dtype=torch.int32)), dim=1),
        torch.cat((narrow.chosen_ids[:, :1], torch.zeros(LAYERS, 4, narrow.max_top_k, dtype=torch.int32)), dim=1),
    )
    observe(record, poisoned)
    check_sums(record.snapshot().total, [wide, narrow, poisoned])


def test_a_row_that_overflowed_does_not_spoil_the_sums() -> None:
    record = make_record()
    logits = torch.zeros(LAYERS, 2, EXPERTS)
    logits[:, 1] = torch.nan
    ids = torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32).expand(LAYERS, 2, 2)
    observe(record, Step(2, logits, ids, ids))
    figures = stats(record.snapshot().total)
    assert figures.tokens == 2
    assert figures.layers[0].entropy == pytest.approx(math.log(EXPERTS) / 2)
    assert sum(figures.layers[0].mean_probability) == pytest.approx(0.5)
    assert torch.isfinite(record.rows(torch.tensor([0, 1]), 2)[2]).all()


def test_the_window_keeps_the_last_steps() -> None:
    steps = make_steps(WINDOW_STEPS + 37, seed=4)
    record = make_record()
    for step in steps[:WINDOW_STEPS]:
        observe(record, step)
    check_sums(record.window(), steps[:WINDOW_STEPS])
    for step in steps[WINDOW_STEPS:]:
        observe(record, step)
    snapshot = record.snapshot()
    assert snapshot.window.tokens.tolist() == [step.num_valid for step in steps[37:]], "oldest first"
    check_sums(record.window(), steps[37:])
    check_sums(snapshot.total, steps)


def test_a_snapshot_is_a_copy() -> None:
    steps = make_steps(5)
    record = recorded(steps[:3])
    before, total, window = record.snapshot(), record.total(), record.window()
    overflow = before.overflow.clone()
    for step in steps[3:]:
        observe(record, step)
    assert torch.equal(before.overflow, overflow)
    assert not torch.equal(record.snapshot().overflow, overflow)
    for sums in (before.total, total, window):
        check_sums(sums, steps[:3])
    check_sums(before.window.over_steps(), steps[:3])


def test_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "WINDOW_STEPS", 4)
    steps = make_steps(13, seed=5)
    record = recorded(steps[:7])
    buffers = [*record._total.tensors(), *record._ring.tensors(), record._overflow]
    addresses = [tensor.data_ptr() for tensor in buffers]
    record.reset()
    kept = [*record._total.tensors(), *record._ring.tensors(), record._overflow]
    assert [tensor.data_ptr() for tensor in kept] == addresses, "what a captured graph writes to stays"
    assert not any(tensor.any() for tensor in record.snapshot().total.tensors())
    assert record.snapshot().window.steps.shape == (0,)
    for step in steps[7:]:
        observe(record, step)
    snapshot = record.snapshot()
    check_sums(snapshot.total, steps[7:])
    check_sums(record.window(), steps[9:])
    assert torch.equal(snapshot.overflow, recorded(steps[7:]).snapshot().overflow)
    assert snapshot.overflow.any()


def test_rows_and_visits_are_of_the_last_step() -> None:
    steps = make_steps(20, seed=9)
    record = recorded(steps)
    step = steps[-1]
    rows = torch.tensor([step.num_valid - 1, 0])
    expert_ids, weights, entropy = record.rows(rows, step.max_top_k)
    assert torch.equal(expert_ids, step.expert_ids[:, rows].transpose(0, 1))
    assert torch.equal(weights, (expert_ids >= 0).float())
    probabilities = torch.softmax(step.logits[:, rows].double(), -1)
    torch.testing.assert_close(entropy.double(), -(probabilities * probabilities.log()).sum(-1).T)
    expected = (step.expert_ids >= 0).sum(dim=(0, 2))[: step.num_valid]
    assert torch.equal(record.visits(step.num_valid, step.max_top_k), expected)


def test_sums_have_one_shape_each() -> None:
    sums = Sums.zeros(7, num_layers=2, num_experts=3, device=CPU)
    shapes = {field.name: tuple(getattr(sums, field.name).shape) for field in fields(sums)}
    assert shapes == {
        "steps": (7,),
        "tokens": (7,),
        "assigned": (7, 2, 3),
        "dispatched": (7, 2, 3),
        "hits": (7, 2, 3),
        "probability": (7, 2, 3),
        "entropy": (7, 2),
    }
