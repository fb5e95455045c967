"""Top-K of the softmax: the router of Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.routing.base import Routing


@dataclass(frozen=True, slots=True)
class TopKSoftmax:
    """Choose the `top_k` most probable experts; with `renormalize` their weights are scaled to sum to 1.

    Mixtral's definition, softmax over the K largest logits, is the same as renormalising their share of the full
    softmax.
    """

    top_k: int
    renormalize: bool

    def __call__(self, logits: Tensor) -> Routing:
        """`logits` [T, E] -> Routing with K_max = top_k. Equal gates go to the lower expert."""
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        # torch.topk leaves the order of equals open; a stable sort does not.
        weights, expert_ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        weights, expert_ids = weights[:, : self.top_k], expert_ids[:, : self.top_k]
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(expert_ids.to(torch.int32), weights, logits)
