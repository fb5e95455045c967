"""GShard's top-2 gating (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.capacity import within_capacity
from engine.routing.choose import mask_forbidden, normalized, top_k
from engine.routing.draws import uniforms


@dataclass(frozen=True, slots=True)
class GShard:
    """Top-2 with weights g1/(g1+g2) and g2/(g1+g2), normalised before anything is dropped.

    A second choice is dispatched only when 2 * g2 exceeds a uniform draw: a weak one is often not worth its cost. All
    first choices are counted before any second one, and an expert's counter advances for every choice, dispatched or
    not.
    """

    capacity_factor: float | None
    max_choices: int = 2
    draws: bool = True

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        chosen, weights = top_k(torch.softmax(mask_forbidden(gates.logits, layer, inputs), dim=-1), layer, inputs)
        weights = normalized(weights)
        kept = chosen >= 0
        if self.capacity_factor is not None:
            kept = within_capacity(chosen, gates.logits.shape[1], self.capacity_factor, inputs)
        lucky = 2 * weights > uniforms(inputs.seeds, inputs.positions, layer, weights.shape[1])
        lucky[:, 0] = True  # the first choice does not depend on chance
        kept = kept & lucky
        return Routing.keeping(kept, chosen, weights, gates.logits)
