"""ExpertPlan: assignments grouped by expert, the value that every grouped GEMM takes.

Example, T = 3 tokens, K = 2, E = 3, expert_ids [[2, 0], [0, -1], [2, 1]]. Assignment t*K + k has number:

    flat          0  1  2  3  4  5
    expert        2  0  0 -1  2  1
    order         1  2  5  0  4  3       sorted by expert, equals in flat order, unused places last
    offsets       [0, 2, 3, 5]           expert 0 owns order[0:2], expert 1 order[2:3], expert 2 order[3:5]
    token_indices 0  1  2  0  2  1       order // K: which row of x each grouped row reads
    inverse       3  0  1  5  4  2       where assignment `flat` stands in the grouped rows

Rows from offsets[-1] on belong to nobody: their contents are undefined and never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """T*K assignments grouped by expert. All tensors are on the device of `expert_ids`."""

    token_indices: Tensor  # [T*K] int64, row of x that a grouped row reads
    inverse: Tensor  # [T*K] int64, grouped row of assignment t*K + k
    offsets: Tensor  # [E + 1] int32, expert e owns grouped rows [offsets[e], offsets[e + 1])


def group(expert_ids: Tensor, num_experts: int) -> ExpertPlan:
    """Group `expert_ids` [T, K] int32 (-1: unused) by expert, without a device synchronisation."""
    num_choices = expert_ids.shape[1]
    flat = expert_ids.flatten().long()
    keys = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(keys, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=keys.device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=keys.device)
    offsets[1:] = torch.cumsum(counts[:num_experts], 0)
    return ExpertPlan(order // num_choices, inverse, offsets)


def combine(grouped: Tensor, routing_weights: Tensor, expert_ids: Tensor, plan: ExpertPlan) -> Tensor:
    """Weighted sum of every token's experts: grouped [T*K, D] -> [T, D] in grouped's dtype, summed in float32.

    Gathers by the inverse permutation and adds in the order of the choices: no atomics, so equal batches give equal
    bits.
    """
    num_tokens, num_choices = expert_ids.shape
    rows = grouped[plan.inverse].view(num_tokens, num_choices, -1).float()
    used = (expert_ids >= 0).unsqueeze(-1)
    weighted = torch.where(used, rows * routing_weights.unsqueeze(-1), 0.0)
    return weighted.sum(dim=1).to(grouped.dtype)
