"""ReferenceBackend: the definitions, written out token by token. Slow on purpose; every other backend is tested
against it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache
from engine.backends.store import ParamStore
from engine.batch import Batch
from engine.routing.base import Routing
from engine.routing.plan import ExpertPlan
from weights.params import ParamSpec, Piece


class ReferenceBackend:
    """See `Backend`. Weights and results have the model's dtype; what happens in between is float32."""

    name = "reference"
    has_fp8_kv_cache = False

    def __init__(self, specs: Iterable[ParamSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._params = ParamStore(specs, device=device, dtype=dtype)

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        self._params.put(piece, tensor, scale)

    def has(self, param: str) -> bool:
        return param in self._params

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype | None = None
    ) -> KVCache:
        assert dtype is None, "it has no other"
        return KVCache.zeros(num_layers, num_blocks, block_size, shape, dtype=self.dtype, device=self.device)

    @property
    def weight_bytes(self) -> int:
        return self._params.num_bytes

    def embed(self, param: str, input_ids: Tensor) -> Tensor:
        return self._params[param][input_ids]

    def linear(self, param: str, x: Tensor) -> Tensor:
        return (x.float() @ self._params[param].float().T).to(x.dtype)

    def logits(self, param: str, x: Tensor) -> Tensor:
        return x.float() @ self._params[param].float().T

    def rms_norm(self, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x[rows]
        wide = x.float()
        return (wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps) * self._params[param].float()).to(x.dtype)

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        result = torch.empty_like(x)
        half = x.shape[-1] // 2
        for token, position in enumerate(positions.tolist()):
            cos, sin = torch.cos(position * inv_freq), torch.sin(position * inv_freq)
            first, second = x[token, :, :half].float(), x[token, :, half:].float()
            result[token, :, :half] = first * cos - second * sin
            result[token, :, half:] = second * cos + first * sin
        return result

    def write_kv(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        for token, slot in enumerate(slot_mapping.tolist()):
            block, offset = divmod(slot, cache.block_size)
            cache.keys[layer, block, offset] = keys[token]
            cache.values[layer, block, offset] = values[token]

    def attention(self, query: Tensor, cache: KVCache, layer: int, batch: Batch, shape: AttentionShape) -> Tensor:
        output = torch.empty_like(query)
        heads_per_kv = shape.num_heads // shape.num_kv_heads
        starts = batch.cu_seqlens.tolist()
        for row, table in enumerate(batch.block_tables.tolist()):
            for token in range(starts[row], starts[row + 1]):
                position = int(batch.positions[token])
                first = 0 if shape.sliding_window is None else max(0, position - shape.sliding_window + 1)
                places = [(table[p // cache.block_size], p % cache.block_size) for p in range(first, position + 1)]
                keys = torch.stack([cache.keys[layer, block, offset] for block, offset in places]).float()
                values = torch.stack([cache.values[layer, block, offset] for block, offset in places]).float()
                for head in range(shape.num_heads):
                    kv_head = head // heads_per_kv
                    scores = keys[:, kv_head] @ query[token, head].float() * shape.scale
                    output[token, head] = torch.softmax(scores, 0) @ values[:, kv_head]
        return output.flatten(1)

    def experts(self, w13: str, w2: str, x: Tensor, routing: Routing, plan: ExpertPlan) -> Tensor:
        del plan  # the definition needs no grouping
        output = torch.zeros_like(x, dtype=torch.float32)
        for token, row in enumerate(x.float()):
            for expert, weight in zip(routing.expert_ids[token].tolist(), routing.weights[token], strict=True):
                if expert >= 0:
                    gate, up = (self._params[w13][expert].float() @ row).chunk(2)
                    output[token] += weight * (self._params[w2][expert].float() @ (torch.nn.functional.silu(gate) * up))
        return output.to(x.dtype)
