"""A decoder layer in two calls of the backend, with the router between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.backends.base import KVCache
from engine.backends.cpu import CpuBackend
from engine.batch import Batch
from engine.layers.moe import RoutingObserver
from engine.routing.base import GateOutput, Router, Routing, RoutingInputs
from engine.routing.topk_softmax import TopKSoftmax


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Layer number `layer`: the same as `DecoderLayer`, by other calls."""

    backend: CpuBackend
    layer: int
    router: Router

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, observe: RoutingObserver | None) -> Tensor:
        """x [T, D] float32, which is changed in place and returned."""
        normed, logits = self.backend.attention_block(self.layer, x, batch, cache)
        routing = self._route(normed, logits, batch.routing)
        if observe is not None:
            observe(self.layer, normed, routing)
        self.backend.moe_block(self.layer, normed, routing, x)
        return x

    def _route(self, normed: Tensor, logits: Tensor, inputs: RoutingInputs) -> Routing:
        router = self.router
        if isinstance(router, TopKSoftmax) and router.capacity_factor is None:
            return self.backend.route(self.layer, logits, inputs, renormalize=router.renormalize)
        name = f"layers.{self.layer}.gate_noise"
        noise = self.backend.linear(name, normed) if router.draws and self.backend.has(name) else None
        return router(GateOutput(logits, noise), self.layer, inputs)
