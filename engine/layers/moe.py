"""The mixture-of-experts block: gate -> router -> plan -> experts -> combine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.backends.base import LayerBackend
from engine.routing.base import GateOutput, Router, RoutingInputs
from engine.routing.plan import group
from engine.routing.record import RoutingRecord


@dataclass(frozen=True, slots=True)
class MoELayer:
    """The sparse feed-forward block of layer number `layer`."""

    backend: LayerBackend
    layer: int
    num_experts: int
    router: Router

    def __call__(self, x: Tensor, inputs: RoutingInputs, record: RoutingRecord | None) -> Tensor:
        """x [T, D] -> [T, D]; writes the layer's part of `record`."""
        name = f"layers.{self.layer}"
        noisy = self.router.draws and self.backend.has(f"{name}.gate_noise")
        noise = self.backend.linear(f"{name}.gate_noise", x) if noisy else None
        gates = GateOutput(self.backend.linear(f"{name}.gate", x), noise)
        routing = self.router(gates, self.layer, inputs)
        if record is not None:
            record.write(self.layer, routing)
        plan = group(routing.expert_ids, self.num_experts)
        return self.backend.experts(f"{name}.w13", f"{name}.w2", x, routing, plan)
