"""A decoder layer in two calls of the backend, with the router between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.backends.base import BlockBackend, KVCache
from engine.batch import Batch
from engine.routing.base import GateOutput, Router, Routing, RoutingInputs
from engine.routing.record import RoutingRecord
from engine.routing.topk_softmax import TopKSoftmax


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Layer number `layer`: the same as `DecoderLayer`, by other calls."""

    backend: BlockBackend
    layer: int
    router: Router

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, record: RoutingRecord | None) -> Tensor:
        """x [T, D], which is changed in place and returned."""
        normed, logits = self.backend.attention_block(self.layer, x, batch, cache)
        routing = self._route(normed, logits, batch.routing, record)
        self.backend.moe_block(self.layer, normed, routing, x)
        return x

    def _route(self, normed: Tensor, logits: Tensor, inputs: RoutingInputs, record: RoutingRecord | None) -> Routing:
        router = self.router
        if isinstance(router, TopKSoftmax) and router.capacity_factor is None:
            return self.backend.route(self.layer, logits, inputs, renormalize=router.renormalize, record=record)
        name = f"layers.{self.layer}.gate_noise"
        noise = self.backend.linear(name, normed) if router.draws and self.backend.has(name) else None
        routing = router(GateOutput(logits, noise), self.layer, inputs)
        if record is not None:
            record.write(self.layer, routing)
        return routing
