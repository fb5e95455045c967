"""Which router a model gets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import ConfigurationError
from engine.routing.base import Router
from engine.routing.gshard import GShard
from engine.routing.noisy_topk import NoisyTopK
from engine.routing.select import make_router, model_top_k
from engine.routing.simulated import Simulated
from engine.routing.switch import Switch
from engine.routing.topk_softmax import TopKSoftmax
from tests.tiny import TINY_MIXTRAL
from weights.config import ROUTER_TYPES


def select(
    *, router: str | None = None, capacity_factor: float | None = None, simulation: str | None = None, **config: Any
) -> Router:
    return make_router(
        replace(TINY_MIXTRAL, **config), router=router, capacity_factor=capacity_factor, simulation=simulation
    )


CASES: list[tuple[dict[str, Any], Router]] = [
    ({}, TopKSoftmax(4, renormalize=True)),
    ({"norm_topk_prob": False}, TopKSoftmax(4, renormalize=False)),
    ({"capacity_factor": 1.5}, TopKSoftmax(4, renormalize=True, capacity_factor=1.5)),
    ({"router_type": "switch"}, Switch(None)),
    ({"router": "switch", "capacity_factor": 1}, Switch(1)),
    ({"router_type": "gshard"}, GShard(None)),
    ({"router": "gshard", "router_type": "switch", "capacity_factor": 2.0}, GShard(2.0)),
    ({"router": "topk_softmax", "router_type": "gshard"}, TopKSoftmax(4, renormalize=True)),
    # Who asks for it by name asks for the noise; a checkpoint that was trained with it runs without.
    ({"router_type": "noisy_topk"}, NoisyTopK(4, draws=False)),
    ({"router": "noisy_topk"}, NoisyTopK(4, draws=True)),
    ({"simulation": "even"}, Simulated("even", 4)),
    ({"simulation": "zipf", "router_type": "switch"}, Simulated("zipf", 4)),
]


@pytest.mark.parametrize(("options", "expected"), CASES, ids=str)
def test_what_is_asked_for_goes_before_the_checkpoint(options: dict[str, Any], expected: Router) -> None:
    assert select(**options) == expected


def test_the_checkpoints_capacity_factor() -> None:
    config = replace(TINY_MIXTRAL, router_type="switch", capacity_factor=1.25)
    assert make_router(config, router=None, capacity_factor=None, simulation=None) == Switch(1.25)
    assert make_router(config, router=None, capacity_factor=2.0, simulation=None) == Switch(2.0)
    assert make_router(config, router="gshard", capacity_factor=None, simulation=None) == GShard(1.25)
    assert make_router(config, router=None, capacity_factor=None, simulation="one") == Simulated("one", 4)
    noisy = make_router(config, router="noisy_topk", capacity_factor=None, simulation=None)
    assert noisy == NoisyTopK(4, draws=True), "nobody asked for a capacity"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "hash"}, "router 'hash' is not one of topk_softmax, switch, gshard, noisy_topk"),
        ({"router": ""}, "router ''"),
        ({"simulation": "random"}, "routing_simulation 'random' is not one of even, zipf, one"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0, not 0"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"capacity_factor": math.nan}, "capacity_factor"),
        ({"capacity_factor": math.inf}, "capacity_factor"),
        ({"router": "noisy_topk", "capacity_factor": 1.0}, "noisy_topk has no capacity"),
        ({"simulation": "zipf", "router": "switch"}, "routing_simulation replaces the router"),
        ({"simulation": "zipf", "capacity_factor": 1.0}, "leave router and capacity_factor out"),
    ],
    ids=str,
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        select(**options)


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_k_of_a_request_that_does_not_steer(router_type: str) -> None:
    most = {"switch": 1, "gshard": 2}.get(router_type, 4)
    for top_k in (1, 2, 3, 4):
        config = replace(TINY_MIXTRAL, router_type=router_type, num_experts_per_tok=top_k)
        router = make_router(config, router=None, capacity_factor=None, simulation=None)
        assert model_top_k(config, router) == {"switch": 1, "gshard": 2}.get(router_type, top_k)
        assert router.max_choices == most
