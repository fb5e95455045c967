"""Expert capacity: how many tokens of a batch an expert takes, and which of its assignments those are.

Shared by Switch (Fedus et al. 2021, arXiv 2101.03961, section 2.2) and GShard (Lepikhin et al. 2020, arXiv 2006.16668,
Algorithm 1). A capacity ties the requests of a batch to one another: who else is there decides who is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.routing.base import RoutingInputs


def within_capacity(chosen_ids: Tensor, num_experts: int, capacity_factor: float, inputs: RoutingInputs) -> Tensor:
    """Which of the choices [T, K] (int32, -1: unused) are dispatched: bool [T, K].

    An expert takes its first C = ceil(capacity_factor * K * T / E) assignments, K being the model's, whatever single
    requests ask for: all first choices are counted before any second one, each in batch order, and a choice counts
    whether it is dispatched or not. Padding neither counts nor adds to T.

    Example, E = 2, C = 2, choices of three tokens [[0, 1], [0, 1], [0, 1]]: expert 0 takes tokens 0 and 1 and drops
    token 2; expert 1 likewise. With [[0, 1], [1, 0], [0, 1]] the first choices give expert 0 tokens 0 and 2 and
    expert 1 token 1; of the second choices expert 1 takes token 0, the rest is dropped.
    """
    num_tokens, num_choices = chosen_ids.shape
    valid = torch.arange(num_tokens, device=chosen_ids.device) < inputs.num_valid_tokens
    in_order = torch.where(valid.unsqueeze(-1), chosen_ids, -1).T.flatten().long()  # choice-major: [K * T]
    one_hot = torch.nn.functional.one_hot(in_order + 1, num_experts + 1)[:, 1:]
    before = one_hot.cumsum(dim=0) - one_hot
    place = (before * one_hot).sum(dim=-1)
    limit = capacity(inputs.top_k[0], num_experts, capacity_factor, inputs.num_valid_tokens)
    kept = (in_order >= 0) & (place < limit)
    return kept.view(num_choices, num_tokens).T


def capacity(top_k: int | Tensor, num_experts: int, capacity_factor: float | Tensor, num_tokens: Tensor) -> Tensor:
    """C = ceil(capacity_factor * K * T / E), as a tensor on the device of `num_tokens` (a count); shapes broadcast."""
    return torch.ceil(capacity_factor * (top_k * num_tokens.double()) / num_experts)
