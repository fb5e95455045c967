"""Forced routing, for load tests: dummy weights can send most tokens to few experts and flatter every figure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.choose import top_k
from engine.routing.draws import uniforms

SIMULATIONS = ("even", "zipf", "one")


@dataclass(frozen=True, slots=True)
class Simulated:
    """Chooses without looking at the logits; all K weights of a token are equal.

    even   token t takes experts t*K, t*K + 1, … (mod E), so that loads differ by one at most
    zipf   K different experts, drawn with probabilities proportional to 1/(1 + expert)
    one    every token takes experts 0 to K - 1
    """

    pattern: str
    max_choices: int
    draws: bool = False
    capacity_factor: float | None = None

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        num_tokens, num_experts = gates.logits.shape
        experts = torch.arange(num_experts, device=gates.logits.device)
        if self.pattern == "even":
            first = (
                torch.arange(num_tokens, device=gates.logits.device).unsqueeze(-1) * inputs.top_k[inputs.slots][:, None]
            )
            scores = num_experts - (experts - first) % num_experts
        elif self.pattern == "zipf":
            # An exponential race: the smallest of Exp(1)/w are a draw without replacement with weights w = 1/(1 + e).
            draws = uniforms(inputs.seeds, inputs.positions, layer, num_experts).double().add(2.0**-25)
            scores = 1.0 / (-draws.log() * (1.0 + experts))
        else:
            scores = (num_experts - experts).expand(num_tokens, num_experts)
        everyone = replace(inputs, min_p=torch.zeros_like(inputs.min_p))  # scores are no probabilities
        chosen, _ = top_k(scores.double(), layer, everyone)
        used = chosen >= 0
        weights = used / used.sum(dim=-1, keepdim=True)
        return Routing(chosen, weights, gates.logits, chosen)
