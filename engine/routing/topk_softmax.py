"""Top-K of the softmax: the router of Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.capacity import within_capacity
from engine.routing.choose import mask_forbidden, normalized, top_k


@dataclass(frozen=True, slots=True)
class TopKSoftmax:
    """Choose the K most probable experts; with `renormalize` their weights are scaled to sum to 1.

    Mixtral's definition, softmax over the K largest logits, is the same as renormalising their share of the full
    softmax. With a `capacity_factor`, which the model does not have of its own, choices beyond it are dropped after
    that.
    """

    max_choices: int
    renormalize: bool
    capacity_factor: float | None = None
    draws: bool = False

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        probabilities = torch.softmax(mask_forbidden(gates.logits, layer, inputs), dim=-1)
        chosen, weights = top_k(probabilities, layer, inputs)
        if self.renormalize:
            weights = normalized(weights)
        if self.capacity_factor is None:
            return Routing(chosen, weights, gates.logits, chosen)
        kept = within_capacity(chosen, gates.logits.shape[1], self.capacity_factor, inputs)
        return Routing.keeping(kept, chosen, weights, gates.logits)
