"""Routing in JSON, and what a steered token cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.types import ExpertVisits, Steering, TokenRouting
from server.json_io import dump
from server.routing import active_params_per_token, token_trace, trace
from tests.server.fake_engine import fake_info
from tests.server.fake_routing import fake_routing


def test_layers_may_have_different_numbers_of_experts() -> None:
    routing = TokenRouting(((3, 1), (), (7,)), ((0.99999, 0.00001), (), (1.0,)), (0.0, 2.07944154, 1e-9))
    assert token_trace(routing) == {
        "experts": [[3, 1], [], [7]],
        "weights": [[1.0, 0.0], [], [1.0]],
        "entropy": [0.0, 2.0794, 0.0],
    }


def test_it_is_compact() -> None:
    """Of Mixtral 8x7B, a token is under a kilobyte."""
    info = replace(fake_info(), num_layers=32)
    assert len(dump(token_trace(fake_routing(7, info)))) < 1000


def test_only_what_was_asked_for_is_there() -> None:
    entry = token_trace(fake_routing(7, fake_info()))
    assert trace(prompt=None, tokens=None) == {}
    assert trace(prompt=(), tokens=None) == {"prompt": []}
    assert trace(prompt=None, tokens=(entry,)) == {"tokens": [entry]}


@pytest.mark.parametrize(
    ("steering", "visits", "expected"),
    [
        (Steering(experts_per_token=1), [ExpertVisits(20, 10)], 900_000),  # 20 visits of 10 tokens in 2 layers: one
        (Steering(min_p=0.1), [ExpertVisits(31, 10)], 800_000 + 155_000),
        (Steering(min_p=0.1), [ExpertVisits(20, 10), ExpertVisits(60, 10)], 1_000_000),  # both choices together
        (Steering(experts_per_token=8), [ExpertVisits(0, 10)], 800_000),  # everything was dropped
        (Steering(experts_per_token=3), [], 1_100_000),
        (Steering(min_p=0.1), [], 1_000_000),
    ],
)
def test_active_params(steering: Steering, visits: list[ExpertVisits], expected: int) -> None:
    assert active_params_per_token(fake_info(), steering, visits) == expected


def test_numbers_are_rounded() -> None:
    for value in [number / 997 for number in range(2 * 997)] + [0.00005, 0.99995, 0.123449999, 0.12345]:
        (found,) = token_trace(TokenRouting(((1,),), ((value,),), (value,)))["entropy"]
        assert found == pytest.approx(value, abs=0.5000001e-4)
        assert len(str(found)) <= 6
