"""What kernels are run on: routing inputs, weights, caches and batches, random and of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.base import AttentionShape
from engine.backends.cuda.moe import ExpertWeights, quantize_rows
from engine.batch import Batch
from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.simulated import Simulated


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)


def routing_inputs(
    num_tokens: int, num_experts: int, top_k: int, device: torch.device, *, steered: bool = False
) -> RoutingInputs:
    """One layer's. With `steered`, rows differ in K and min-p, and experts are forbidden for some."""
    slots = torch.arange(num_tokens, device=device) % 4 if steered else torch.zeros(num_tokens, device=device).long()
    forbidden = torch.zeros(4, 1, num_experts, dtype=torch.bool, device=device)
    forbidden[3, 0, :2] = True
    return RoutingInputs(
        num_valid_tokens=torch.tensor(num_tokens, device=device),
        slots=slots,
        top_k=torch.tensor([top_k, 1, min(top_k + 1, num_experts), top_k], device=device),
        min_p=torch.tensor([0.0, 0.0, 0.3, 0.0], device=device),
        forbidden=forbidden,
        seeds=torch.arange(num_tokens, device=device) + 1000,
        positions=torch.arange(num_tokens, device=device),
        max_top_k=min(top_k + 1, num_experts) if steered else top_k,
    )


def simulated(pattern: str, num_tokens: int, num_experts: int, top_k: int, device: torch.device) -> Routing:
    """`pattern`: even, zipf or one."""
    inputs = routing_inputs(num_tokens, num_experts, top_k, device)
    logits = torch.zeros(num_tokens, num_experts, device=device)
    return Simulated(pattern, num_experts)(GateOutput(logits, None), 0, inputs)


def expert_weights(
    num_experts: int, hidden: int, ffn: int, *, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype
) -> ExpertWeights:
    """Every expert differs; made one by one, for the sake of memory."""
    w13, w13_scale = _matrices(num_experts, 2 * ffn, hidden, device, dtype, weight_dtype, seed=1000)
    w2, w2_scale = _matrices(num_experts, hidden, ffn, device, dtype, weight_dtype, seed=2000)
    return ExpertWeights(w13, w2, w13_scale, w2_scale)


def _matrices(
    num_experts: int,
    rows: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    weights = torch.empty(num_experts, rows, size, device=device, dtype=weight_dtype)
    scales = torch.empty(num_experts, rows, device=device) if weight_dtype != dtype else None
    for expert in range(num_experts):
        own = normal(rows, size, device=device, dtype=dtype, seed=seed + expert) / size**0.5
        if scales is None:
            weights[expert] = own
        else:
            weights[expert], scales[expert] = quantize_rows(own, weight_dtype)
    return weights, scales


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer, and the pages that batches take from it."""

    keys: Tensor
    values: Tensor
    pages: Tensor

    @classmethod
    def random(
        cls, num_blocks: int, block_size: int, shape: AttentionShape, *, device: torch.device, dtype: torch.dtype
    ) -> Cache:
        size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        keys, values = (torch.empty(size, device=device, dtype=dtype) for _ in range(2))
        for seed, part in enumerate((keys, values)):
            for number, block in enumerate(part.chunk(16)):
                own = normal(*block.shape, device=device, dtype=torch.float16, seed=100 * seed + number)
                block.copy_(own)
        generator = torch.Generator(device).manual_seed(7)
        return cls(keys, values, torch.randperm(num_blocks, generator=generator, device=device).int())

    def batch(self, sizes: list[tuple[int, int]]) -> Batch:
        """Sequences of (queries, context), over scattered pages."""
        device, block_size = self.keys.device, self.keys.shape[1]
        query_lens, context_lens = ([size[i] for size in sizes] for i in range(2))
        counts = [-(-context // block_size) for context in context_lens]
        tables = torch.zeros(len(sizes), max(counts), dtype=torch.int32, device=device)
        first = 0
        for row, count in enumerate(counts):
            tables[row, :count] = self.pages[first : first + count]
            first += count
        assert first <= self.pages.shape[0]
        positions = [range(context - queries, context) for queries, context in sizes]
        rows = torch.tensor([row for row, own in enumerate(positions) for _ in own], device=device)
        flat = torch.tensor([position for own in positions for position in own], device=device)
        cu_seqlens = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = torch.tensor(query_lens, device=device).cumsum(0)
        return Batch(
            input_ids=torch.zeros_like(flat),
            positions=flat,
            slot_mapping=tables[rows, flat // block_size].long() * block_size + flat % block_size,
            cu_seqlens=cu_seqlens,
            seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables=tables,
            logits_indices=cu_seqlens[1:].long() - 1,
            routing=routing_inputs(len(flat), 8, 2, device),
            query_lens=query_lens,
            context_lens=context_lens,
        )
