"""TorchBackend: plain torch operations, for the CPU and for CUDA (grouped GEMM on Hopper and later)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache
from engine.backends.store import ParamStore
from engine.batch import Batch
from engine.routing.base import Routing
from engine.routing.plan import ExpertPlan, combine
from weights.params import ParamSpec, Piece

# Cached positions gathered at once for a group of decodes, padding included: bounds the copy that paged attention
# makes.
_GATHER_TOKENS = 65536


class TorchBackend:
    """See `Backend`. Attention gathers the pages it needs and calls scaled_dot_product_attention."""

    name = "torch"
    has_fp8_kv_cache = False

    def __init__(self, specs: Iterable[ParamSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._params = ParamStore(specs, device=device, dtype=dtype)
        self._grouped_mm = (
            device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
        )

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
        return F.embedding(input_ids, self._params[param])

    def linear(self, param: str, x: Tensor) -> Tensor:
        return F.linear(x, self._params[param])

    def logits(self, param: str, x: Tensor) -> Tensor:
        return F.linear(x, self._params[param]).float()

    def rms_norm(self, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x[rows]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return self._params[param] * wide.to(x.dtype)

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        angles = positions.float().unsqueeze(-1) * inv_freq  # [T, N/2]
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def write_kv(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        # A masked position still takes part, times zero: who overflows must leave nothing behind that is not finite.
        keys, values = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (keys, values))
        cache.keys[layer].flatten(0, 1).index_copy_(0, slot_mapping, keys)
        cache.values[layer].flatten(0, 1).index_copy_(0, slot_mapping, values)

    def attention(self, query: Tensor, cache: KVCache, layer: int, batch: Batch, shape: AttentionShape) -> Tensor:
        """Decodes are gathered in groups of similar length; each prompt chunk is a call of its own."""
        output = torch.empty_like(query)
        keys, values = cache.keys[layer], cache.values[layer]
        starts = [0]
        for length in batch.query_lens:
            starts.append(starts[-1] + length)
        for rows in _decode_groups(batch, cache.block_size):
            index = torch.tensor([starts[row] for row in rows], device=query.device)
            longest = max(batch.context_lens[row] for row in rows)
            select = torch.tensor(rows, device=query.device)
            pages = batch.block_tables[select, : -(-longest // cache.block_size)]
            positions = batch.seq_lens[select] - 1
            output[index] = _paged_sdpa(query[index].unsqueeze(1), keys, values, pages, positions[:, None], shape)[:, 0]
        for row, length in enumerate(batch.query_lens):
            if length > 1:
                chunk = slice(starts[row], starts[row + 1])
                pages = batch.block_tables[row : row + 1, : -(-batch.context_lens[row] // cache.block_size)]
                positions = batch.positions[None, chunk]
                output[chunk] = _paged_sdpa(query[None, chunk], keys, values, pages, positions, shape)[0]
        return output.flatten(1)

    def experts(self, w13: str, w2: str, x: Tensor, routing: Routing, plan: ExpertPlan) -> Tensor:
        rows = x[plan.token_indices]
        # The grouped GEMM wants rows of a multiple of 16 bytes.
        if self._grouped_mm and self._params[w13].shape[-1] % 8 == 0 and self._params[w2].shape[-1] % 8 == 0:
            ends = plan.offsets[1:]
            gate, up = F.grouped_mm(rows, self._params[w13].transpose(-2, -1), offs=ends).chunk(2, dim=-1)
            grouped = F.grouped_mm(F.silu(gate) * up, self._params[w2].transpose(-2, -1), offs=ends)
        else:
            grouped = torch.empty_like(rows)
            offsets = plan.offsets.tolist()
            for expert in range(len(offsets) - 1):
                own = slice(offsets[expert], offsets[expert + 1])
                if own.start < own.stop:
                    gate, up = F.linear(rows[own], self._params[w13][expert]).chunk(2, dim=-1)
                    grouped[own] = F.linear(F.silu(gate) * up, self._params[w2][expert])
        return combine(grouped, routing.weights, routing.expert_ids, plan)


def _decode_groups(batch: Batch, block_size: int) -> Iterator[list[int]]:
    """Rows with one query each, sorted by context length and cut so that a padded group gathers at most
    _GATHER_TOKENS.
    """
    rows = sorted(
        (row for row, length in enumerate(batch.query_lens) if length == 1), key=lambda row: batch.context_lens[row]
    )
    group: list[int] = []
    for row in rows:
        padded = -(-batch.context_lens[row] // block_size) * block_size
        if group and (len(group) + 1) * padded > _GATHER_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _paged_sdpa(
    query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, positions: Tensor, shape: AttentionShape
) -> Tensor:
    """query [B, Q, H, N], one layer's keys and values [blocks, block_size, G, N], pages [B, P] -> [B, Q, H, N].

    The H/G query heads that share a kv head are laid along the query axis, so that no key is copied per head:
    query head h belongs to kv head h // (H/G). A key at position j is seen from position i when i - window < j <= i.
    """
    num_seqs, num_queries, num_heads, head_dim = query.shape
    groups = num_heads // shape.num_kv_heads
    gathered_k = keys[pages].flatten(1, 2).transpose(1, 2)  # [B, G, P * block_size, N]
    gathered_v = values[pages].flatten(1, 2).transpose(1, 2)
    context = torch.arange(gathered_k.shape[2], device=query.device)
    seen = context <= positions.unsqueeze(-1)  # [B, Q, context]
    if shape.sliding_window is not None:
        seen &= context > positions.unsqueeze(-1) - shape.sliding_window
    folded = query.view(num_seqs, num_queries, shape.num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(num_seqs, shape.num_kv_heads, groups * num_queries, head_dim)
    mask = seen.unsqueeze(1).repeat(1, 1, groups, 1)  # rows in the same (group, query) order
    result = F.scaled_dot_product_attention(folded, gathered_k, gathered_v, attn_mask=mask, scale=shape.scale)
    result = result.view(num_seqs, shape.num_kv_heads, groups, num_queries, head_dim).permute(0, 3, 1, 2, 4)
    return result.reshape(num_seqs, num_queries, num_heads, head_dim)
