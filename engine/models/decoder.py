"""The skeleton that all decoder families share: embed, layers of attention and feed-forward, final norm, logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.backends.base import AttentionShape, Backend, KVCache, LayerBackend
from engine.batch import Batch
from engine.layers.attention import Attention
from engine.layers.moe import MoELayer
from engine.routing.record import RoutingRecord


class Layer(Protocol):
    """Pre-norm residual layer: x + attention(norm(x)), then x + moe(norm(x))."""

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, record: RoutingRecord | None) -> Tensor:
        """x [T, D] -> [T, D]; x may be overwritten. Writes this step's keys and values into the cache, and
        the layer's part of `record`."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A layer of a backend's single operations."""

    backend: LayerBackend
    attention: Attention
    moe: MoELayer
    norm_eps: float

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, record: RoutingRecord | None) -> Tensor:
        name = f"layers.{self.attention.layer}"
        x = x + self.attention(self.backend.rms_norm(f"{name}.input_norm", x, self.norm_eps), batch, cache)
        normed = self.backend.rms_norm(f"{name}.post_attention_norm", x, self.norm_eps)
        return x + self.moe(normed, batch.routing, record)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder-only language model over a backend's weights."""

    backend: Backend
    layers: Sequence[Layer]
    attention_shape: AttentionShape
    norm_eps: float
    lm_head: str
    """The parameter of the vocabulary projection: `lm_head`, or `embed_tokens` when they are tied."""

    def forward(self, batch: Batch, cache: KVCache, record: RoutingRecord | None = None) -> Tensor:
        """All tokens of the batch -> hidden states [T, D] after the last layer, before the final norm."""
        x = self.backend.embed("embed_tokens", batch.input_ids)
        for layer in self.layers:
            x = layer(x, batch, cache, record)
        return x

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hidden states [T, D], all of them or their `rows` [R] int64 -> logits [T or R, V] float32."""
        return self.backend.logits(self.lm_head, self.backend.rms_norm("norm", hidden, self.norm_eps, rows))
