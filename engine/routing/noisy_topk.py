"""Noisy top-K gating (Shazeer et al. 2017, arXiv 1701.06538, section 2.1, equations 3 to 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.choose import mask_forbidden, normalized, top_k
from engine.routing.draws import normals


@dataclass(frozen=True, slots=True)
class NoisyTopK:
    """Top-K of H = z + N(0, 1) * softplus(noise), weights the softmax over the K kept values of H.

    The noise gate is a weight of its own; a checkpoint without one gets scale 1. Without `draws` the noise is left out,
    as it is at inference unless asked for.
    """

    max_choices: int
    draws: bool
    capacity_factor: float | None = None

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        values = gates.logits.float()
        if self.draws:
            scale = 1.0 if gates.noise is None else F.softplus(gates.noise.float())
            values = values + scale * normals(inputs.seeds, inputs.positions, layer, gates.logits.shape[1])
        # Renormalised probabilities of the full softmax are the softmax over the kept values.
        chosen, weights = top_k(torch.softmax(mask_forbidden(values, layer, inputs), dim=-1), layer, inputs)
        return Routing(chosen, normalized(weights), gates.logits, chosen)
