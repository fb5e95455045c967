"""What answers say of routing: the trace of a choice, and what a capacity would have dropped."""

from __future__ import annotations

from typing_extensions import TypedDict


class TokenTrace(TypedDict):
    """One token. Each list has one entry a layer; numbers have four decimals."""

    experts: list[list[int]]
    """Those that computed, the most probable first."""
    weights: list[list[float]]
    """Parallel to `experts`."""
    entropy: list[float]
    """Of the router's whole distribution, in nats."""


class RoutingTrace(TypedDict, total=False):
    """`prompt` has one entry a prompt token, `tokens` one a completion token as `usage` counts them.

    A whole answer has the lists that were asked for; a chunk those that have something for it.
    """

    prompt: list[TokenTrace]
    tokens: list[TokenTrace]


class Overflow(TypedDict):
    """Assignments over the capacity in some traffic; by layer, and by layer and expert."""

    exact: bool
    capacity_factor: float
    assigned: int
    overflow: int
    overflow_share: float
    by_layer: list[int]
    by_expert: list[list[int]]


class WhatIf(TypedDict):
    capacity_factor: float
    window_steps: int
    window: Overflow
    total: Overflow
