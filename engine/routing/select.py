"""Which router a model gets: from its configuration, or from the operator for an experiment."""

from __future__ import annotations

import math

from engine.errors import ConfigurationError
from engine.routing.base import Router
from engine.routing.gshard import GShard
from engine.routing.noisy_topk import NoisyTopK
from engine.routing.simulated import SIMULATIONS, Simulated
from engine.routing.switch import Switch
from engine.routing.topk_softmax import TopKSoftmax
from weights.config import ROUTER_TYPES, ModelConfig


def check_options(*, router: str | None, capacity_factor: float | None, simulation: str | None) -> None:
    """Raise ConfigurationError for what no model can be routed by; `make_router` has the rest."""
    if router is not None and router not in ROUTER_TYPES:
        raise ConfigurationError(f"router {router!r} is not one of {', '.join(ROUTER_TYPES)}")
    if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ConfigurationError(f"capacity_factor must be above 0, not {capacity_factor}")
    if simulation is not None and simulation not in SIMULATIONS:
        raise ConfigurationError(f"routing_simulation {simulation!r} is not one of {', '.join(SIMULATIONS)}")
    if simulation is not None and (router is not None or capacity_factor is not None):
        raise ConfigurationError("routing_simulation replaces the router: leave router and capacity_factor out")


def make_router(
    config: ModelConfig, *, router: str | None, capacity_factor: float | None, simulation: str | None
) -> Router:
    """The router of `config`, or the one called `router`, with `capacity_factor`; or `simulation` instead of any.

    Asking for noisy_topk by name asks for its noise; a checkpoint whose router it is runs without. Switch and GShard
    need a capacity factor for their capacity; without one they drop nothing for want of it. Raises
    ConfigurationError.
    """
    check_options(router=router, capacity_factor=capacity_factor, simulation=simulation)
    factor = config.capacity_factor if capacity_factor is None else capacity_factor
    if simulation is not None:
        return Simulated(simulation, config.num_experts)
    name = config.router_type if router is None else router
    if name == "switch":
        return Switch(factor)
    if name == "gshard":
        return GShard(factor)
    if name == "noisy_topk":
        if capacity_factor is not None:
            raise ConfigurationError("router noisy_topk has no capacity: leave capacity_factor out")
        return NoisyTopK(config.num_experts, draws=router is not None)
    return TopKSoftmax(config.num_experts, config.norm_topk_prob, factor)


def model_top_k(config: ModelConfig, router: Router) -> int:
    """K of a request that does not steer: the configuration's; by definition 1 for switch and 2 for gshard."""
    if isinstance(router, Switch | GShard):
        return min(router.max_choices, config.num_experts)
    return config.num_experts_per_tok
