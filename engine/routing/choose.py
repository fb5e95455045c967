"""What routers have in common: forbidden experts, top-K with a K of each row's own, and min-p.

In the order of the HTTP contract: forbidden experts get -inf before the softmax, then top-K, then min-p drops every
chosen expert whose probability is under p times the best one's. Renormalising is the router's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.routing.base import RoutingInputs


def mask_forbidden(logits: Tensor, layer: int, inputs: RoutingInputs) -> Tensor:
    """`logits` [T, E] in float32, -inf where the row's request forbids the expert in this layer."""
    return logits.float().masked_fill(inputs.forbidden[inputs.slots, layer], -torch.inf)


def normalized(weights: Tensor) -> Tensor:
    """`weights` [T, K_max] scaled to sum to 1 a row; a row without any stays 0."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def top_k(scores: Tensor, layer: int, inputs: RoutingInputs) -> tuple[Tensor, Tensor]:
    """The K best of `scores` [T, E] >= 0, best first: (expert_ids [T, K_max] int32 with -1 in unused places, their
    scores).

    Row t has K = top_k[slots[t]], fewer where experts are forbidden or fall under min-p. Equal scores go to the lower
    expert. The scores of unused places are 0.
    """
    # An allowed expert may have score 0 too, where the softmax of a gate far below the best one underflows.
    scores = scores.masked_fill(inputs.forbidden[inputs.slots, layer], -1.0)
    # torch.topk leaves the order of equals open; a stable sort does not.
    ordered, expert_ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    ordered, expert_ids = ordered[:, : inputs.max_top_k], expert_ids[:, : inputs.max_top_k]
    places = torch.arange(ordered.shape[1], device=scores.device)
    used = places < inputs.top_k[inputs.slots].unsqueeze(-1)
    used &= ordered >= 0
    used &= ordered >= inputs.min_p[inputs.slots].unsqueeze(-1) * ordered[:, :1]
    return torch.where(used, expert_ids, -1).to(torch.int32), torch.where(used, ordered, 0.0)
