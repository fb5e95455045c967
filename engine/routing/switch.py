"""The Switch Transformer's router (Fedus et al. 2021, arXiv 2101.03961, section 2.1 and 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.capacity import within_capacity
from engine.routing.choose import mask_forbidden, top_k


@dataclass(frozen=True, slots=True)
class Switch:
    """Every token goes to its one most probable expert, weighted by that probability, not renormalised.

    Tokens beyond the capacity overflow in batch order: the layer adds nothing to them, the residual carries them on.
    Jitter belongs to training and is left out.
    """

    capacity_factor: float | None
    max_choices: int = 1
    draws: bool = False

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        chosen, weights = top_k(torch.softmax(mask_forbidden(gates.logits, layer, inputs), dim=-1), layer, inputs)
        if self.capacity_factor is None:
            return Routing(chosen, weights, gates.logits, chosen)
        kept = within_capacity(chosen, gates.logits.shape[1], self.capacity_factor, inputs)
        return Routing.keeping(kept, chosen, weights, gates.logits)
