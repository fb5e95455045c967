"""SteeringTable: every request of a batch finds its own way of steering in its slot, however few slots there are."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.routing.steering import SteeringTable, forbidden_mask
from engine.types import Steering
from tests.engine.routing.inputs import CPU
from tests.tiny import TINY_MIXTRAL

LAYERS, EXPERTS, TOP_K = 3, 5, 2


def make_table(num_slots: int) -> SteeringTable:
    return SteeringTable(num_slots=num_slots, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, device=CPU)


def k(number: int) -> Steering:
    """A way of steering that tells itself from others by its min-p."""
    return Steering(min_p=number / 64)


def test_a_new_table_routes_as_the_model_does() -> None:
    table = SteeringTable.for_model(TINY_MIXTRAL, num_slots=4, device=CPU)
    assert table.top_k.tolist() == [2] * 4
    assert table.min_p.tolist() == [0.0] * 4
    assert table.forbidden.shape == (4, 2, 4)
    assert not table.forbidden.any()
    assert (table.top_k.dtype, table.min_p.dtype, table.forbidden.dtype) == (torch.int64, torch.float32, torch.bool)


def check(table: SteeringTable, steerings: list[Steering | None], slots: list[int]) -> None:
    for steering, slot in zip(steerings, slots, strict=True):
        assert (slot == 0) == (steering is None)
        steering = steering or Steering()
        assert int(table.top_k[slot]) == (steering.experts_per_token or TOP_K)
        assert float(table.min_p[slot]) == pytest.approx(steering.min_p)
        expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
        for layer, experts in steering.forbidden:
            for expert in experts:
                expected[slice(None) if layer is None else layer, expert] = True
        assert torch.equal(table.forbidden[slot], expected)


WAYS = [
    None,
    Steering(),
    Steering(experts_per_token=1),
    Steering(experts_per_token=EXPERTS),
    Steering(min_p=0.25),
    Steering(forbidden=((None, (0, 3)),)),
    Steering(forbidden=((None, (1,)), (2, (0, 4)), (0, ())), experts_per_token=3, min_p=1.0),
    Steering(forbidden=((0, (0,)), (1, (1,)), (2, (2,)))),
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(WAYS), min_size=1, max_size=9), max_size=12), st.data())
def test_the_slots_hold_what_the_batch_asks_for(batches: list[list[Steering | None]], data: st.DataObject) -> None:
    """With as few slots as the largest batch needs: ways of earlier batches are given up."""
    most = max((len(set(batch) - {None}) for batch in batches), default=0)
    table = make_table(most + 1 + data.draw(st.integers(0, 2)))
    for batch in batches:
        slots = table.slots_of(batch)
        check(table, batch, slots)
        assert len(set(slots)) == len(set(batch)), "one slot a way of steering"
        assert table.max_top_k(batch) == max((s and s.experts_per_token) or TOP_K for s in batch)


def test_a_way_that_is_known_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(4)
    first = table.slots_of([k(1), None, k(2), k(1)])
    monkeypatch.setattr(table, "_fill", lambda *_: pytest.fail("written again"))
    assert table.slots_of([k(2), k(1), None]) == [first[2], first[0], 0]
    assert table.slots_of([Steering(min_p=1 / 64)]) == [first[0]], "equal is the same"


def test_the_least_recently_used_goes() -> None:
    table = make_table(4)
    slots = {number: table.slots_of([k(number)])[0] for number in (1, 2, 3)}
    table.slots_of([k(1)])
    assert table.slots_of([k(4)]) == [slots[2]]
    assert table.slots_of([k(1), k(3), k(4)]) == [slots[1], slots[3], slots[2]]


def test_slots_of_the_current_batch_are_never_taken() -> None:
    """The oldest way stands last in a batch whose first is new: it must be the others that go."""
    table = make_table(4)
    slots = [table.slots_of([k(number)])[0] for number in (1, 2, 3)]
    batch = [k(4), k(5), k(1)]
    again = table.slots_of(batch)
    assert again[2] == slots[0]
    check(table, batch, again)  # type: ignore[arg-type]


def test_long_traffic_of_many_ways() -> None:
    rng = random.Random(0)
    table = make_table(9)
    for _ in range(200):
        batch = [rng.choice([None, k(rng.randrange(1, 40))]) for _ in range(8)]
        check(table, batch, table.slots_of(batch))


def test_masks() -> None:
    mask = forbidden_mask(Steering(forbidden=((None, (1,)), (1, (0, 2)), (1, (0,)))), 2, 4)
    assert mask.tolist() == [[False, True, False, False], [True, True, True, False]]


def test_what_keeps_hidden_states_apart() -> None:
    digests = [way.digest() for way in WAYS if way is not None]
    assert len(set(digests)) == len(digests)
    assert Steering(min_p=0.25).digest() == Steering(min_p=0.25).digest()
