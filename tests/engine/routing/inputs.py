"""Routing inputs without requests: steering given as a list, one entry a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.routing.base import GateOutput, Router, Routing, RoutingInputs
from engine.routing.steering import SteeringTable
from engine.types import Steering

CPU = torch.device("cpu")


def plain_table(*, num_layers: int = 1, num_experts: int = 4, top_k: int = 2, num_slots: int = 2) -> SteeringTable:
    return SteeringTable(num_slots=num_slots, num_layers=num_layers, num_experts=num_experts, top_k=top_k, device=CPU)


def make_inputs(
    steerings: Sequence[Steering | None],
    *,
    num_experts: int,
    top_k: int,
    num_layers: int = 1,
    num_valid: int | None = None,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> RoutingInputs:
    """One row a steering; without seeds row t has seed 1000 + t, without positions all are at position 0."""
    num_tokens = len(steerings)
    table = plain_table(num_layers=num_layers, num_experts=num_experts, top_k=top_k, num_slots=num_tokens + 1)
    return RoutingInputs(
        num_valid_tokens=torch.tensor(num_tokens if num_valid is None else num_valid),
        slots=torch.tensor(table.slots_of(steerings), dtype=torch.int64),
        top_k=table.top_k,
        min_p=table.min_p,
        forbidden=table.forbidden,
        seeds=torch.tensor(range(1000, 1000 + num_tokens) if seeds is None else seeds, dtype=torch.int64),
        positions=torch.tensor([0] * num_tokens if positions is None else positions, dtype=torch.int64),
        max_top_k=table.max_top_k(steerings) if steerings else top_k,
    )


def route(
    router: Router,
    logits: Tensor,
    top_k: int,
    *,
    noise: Tensor | None = None,
    num_valid: int | None = None,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Routing:
    """`logits` [T, E] by `router`, all rows without steering and with the same K."""
    inputs = make_inputs(
        [None] * logits.shape[0],
        num_experts=logits.shape[1],
        top_k=top_k,
        num_valid=num_valid,
        seeds=seeds,
        positions=positions,
    )
    return router(GateOutput(logits, noise), 0, inputs)
