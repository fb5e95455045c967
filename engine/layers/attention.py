"""Self-attention over the paged cache: QKV in one projection, rotary, write, attend, project."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.backends.base import AttentionShape, KVCache, LayerBackend
from engine.batch import Batch


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions, layer number `layer`."""

    backend: LayerBackend
    layer: int
    shape: AttentionShape
    inv_freq: Tensor  # [N/2] float32

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """x [T, D] -> [T, D]; writes this step's keys and values into the cache first."""
        shape, name = self.shape, f"layers.{self.layer}"
        heads = self.backend.linear(f"{name}.qkv", x).view(x.shape[0], -1, shape.head_dim)  # [T, H + 2G, N]
        query = heads[:, : shape.num_heads]
        keys, values = heads[:, shape.num_heads :].chunk(2, dim=1)
        query = self.backend.rotary(query, batch.positions, self.inv_freq)
        keys = self.backend.rotary(keys, batch.positions, self.inv_freq)
        self.backend.write_kv(cache, self.layer, keys, values, batch.slot_mapping)
        return self.backend.linear(f"{name}.o", self.backend.attention(query, cache, self.layer, batch, shape))
