"""Backend: the operations that a device offers to the layers, and the weights it keeps in a form of its own.

Dimensions: T tokens, B sequences, D hidden_size, H heads, G kv heads, N head_dim, E experts, F intermediate_size, V
vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.backends.host_memory import host_zeros
from engine.batch import Batch
from engine.routing.base import Routing, RoutingInputs
from engine.routing.plan import ExpertPlan
from engine.routing.record import RoutingRecord
from weights.params import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What attention needs to know of the model. `sliding_window` in tokens; a query sees itself and window - 1
    before.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None

    @property
    def scale(self) -> float:
        return math.pow(self.head_dim, -0.5)


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, paged: [L, num_blocks, block_size, G, N] each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def zeros(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        shape: AttentionShape,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """A cache of zeros: a masked position must be finite, since 0 * NaN is NaN."""
        size = (num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        return cls(_zeros(size, dtype, device), _zeros(size, dtype, device))

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return host_zeros(size, dtype)


class Backend(Protocol):
    """What a decoder needs of a device around its layers. Weights are named by parameter (weights/params.py); what a
    name stands for is the backend's business: models only hand names back to it.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    has_fp8_kv_cache: bool
    """Whether `new_kv_cache` takes float8_e4m3fn, on this device."""

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Take one checkpoint tensor, on any device, into the backend's own form. The tensor is not kept.

        With a `scale`, float32 [rows, 1], it is float8_e4m3fn and stands for tensor * scale.
        """
        ...

    def has(self, param: str) -> bool:
        """Whether any piece of the parameter was prepared."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that were made of what was prepared."""
        ...

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype | None = None
    ) -> KVCache:
        """A cache whose contents are finite, of the backend's dtype, or of `dtype`, float8_e4m3fn, if it has that."""
        ...

    def embed(self, param: str, input_ids: Tensor) -> Tensor:
        """Rows of the table: input_ids [T] -> [T, D]."""
        ...

    def linear(self, param: str, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        ...

    def logits(self, param: str, x: Tensor) -> Tensor:
        """The vocabulary projection: x [R, D] -> [R, V] float32."""
        ...

    def rms_norm(self, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32, returned in x's dtype (Zhang & Sennrich 2019).

        Of all rows of x [T, D], or of `rows` [R] int64: -> [R, D].
        """
        ...


class LayerBackend(Backend, Protocol):
    """And the operations of a layer, one by one."""

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """Rotate the two halves of every head: x [T, heads, N], positions [T], inv_freq [N/2] (Su et al. 2021)."""
        ...

    def write_kv(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        """Put keys and values [T, G, N] into their slots."""
        ...

    def attention(self, query: Tensor, cache: KVCache, layer: int, batch: Batch, shape: AttentionShape) -> Tensor:
        """Causal attention of query [T, H, N] over the cache, this step's keys included -> [T, H * N]."""
        ...

    def experts(self, w13: str, w2: str, x: Tensor, routing: Routing, plan: ExpertPlan) -> Tensor:
        """sum_k weight_k * W2_k(silu(W1_k x) * W3_k x) over each token's experts: x [T, D] -> [T, D]."""
        ...


@runtime_checkable
class BlockBackend(Backend, Protocol):
    """And a layer in two halves; the router stands between them."""

    def attention_block(self, layer: int, x: Tensor, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Add attention(norm(x)) to x [T, D] in place, and write this step's keys and values into the cache.

        Returns norm(x) [T, D] of the result, by the norm after attention, and the gate's logits [T, E] for it.
        """
        ...

    def route(
        self, layer: int, logits: Tensor, inputs: RoutingInputs, *, renormalize: bool, record: RoutingRecord | None
    ) -> Routing:
        """As `TopKSoftmax` without a capacity: logits [T, E]. Writes the layer's part of `record`."""
        ...

    def moe_block(self, layer: int, normed: Tensor, routing: Routing, x: Tensor) -> None:
        """Add to x [T, D], in place, sum_k weight_k * W2_k(silu(W1_k row) * W3_k row) for the rows of `normed`."""
        ...
