"""What the kernels compute, in float32 by torch's operations, one expert or one sequence after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.base import AttentionShape
from engine.backends.cuda.moe import ExpertWeights
from engine.batch import Batch
from engine.routing.base import Routing


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; what is not finite is infinitely wrong."""
    actual, expected = actual.float(), expected.float()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def experts(x: Tensor, weights: ExpertWeights, routing: Routing) -> Tensor:
    """sum_k weight_k * W2_k(silu(W1_k x) * W3_k x): x [T, D] -> [T, D] float32."""
    result = torch.zeros(x.shape, device=x.device)
    for expert in range(weights.w13.shape[0]):
        tokens, places = (routing.expert_ids == expert).nonzero(as_tuple=True)
        if tokens.numel():
            gate, up = F.linear(x[tokens].float(), _wide(weights.w13, weights.w13_scale, expert)).chunk(2, dim=-1)
            down = F.linear(F.silu(gate) * up, _wide(weights.w2, weights.w2_scale, expert))
            result.index_add_(0, tokens, down * routing.weights[tokens, places].unsqueeze(-1))
    return result


def _wide(weights: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    wide = weights[expert].float()
    return wide if scale is None else wide * scale[expert].unsqueeze(-1)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, batch: Batch, shape: AttentionShape, sequence: int
) -> Tensor:
    """Of the queries of one sequence: [T, H, N] and the cache of a layer -> [its tokens, H * N] float32."""
    start, length = sum(batch.query_lens[:sequence]), batch.query_lens[sequence]
    context, block_size = batch.context_lens[sequence], keys.shape[1]
    pages = batch.block_tables[sequence, : -(-context // block_size)]
    positions = torch.arange(context - length, context, device=query.device).unsqueeze(-1)
    places = torch.arange(context, device=query.device)
    seen = places <= positions
    if shape.sliding_window is not None:
        seen &= places > positions - shape.sliding_window
    group = shape.num_heads // shape.num_kv_heads
    results = []
    for head in range(shape.num_kv_heads):  # one after another, for the sake of memory
        own = query[start : start + length, head * group : (head + 1) * group].float().transpose(0, 1)
        own_keys, own_values = (part[pages, :, head].flatten(0, 1)[:context].float() for part in (keys, values))
        scores = (own @ own_keys.T * shape.scale).masked_fill_(~seen, -torch.inf)
        results.append((scores.softmax(dim=-1) @ own_values).transpose(0, 1))
    return torch.cat(results, dim=1).flatten(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotary(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [T, heads, N]."""
    angles = (positions.float().unsqueeze(-1) * inv_freq).unsqueeze(1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)
