"""What the sums of a routing record say: balance, entropy, losses, and the capacity that traffic would have needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.routing.capacity import capacity
from engine.routing.record import RoutingSnapshot, Sums, bucket_bounds
from engine.types import CapacityWhatIf, LayerRouting, RoutingStats


def stats(sums: Sums) -> RoutingStats:
    """Figures of the traffic in `sums` (without a leading dimension)."""
    num_experts = sums.assigned.shape[1]
    tokens, steps = int(sums.tokens), int(sums.steps)
    loads = sums.assigned.double()
    mean = loads.mean(dim=1)
    fractions = loads / loads.sum(dim=1, keepdim=True).clamp(min=1)
    probabilities = sums.probability / max(tokens, 1)
    auxiliary = num_experts * (fractions * probabilities).sum(dim=1)
    entropy = sums.entropy / max(tokens, 1)
    deviation = loads.std(dim=1, correction=0)
    layers = tuple(
        LayerRouting(
            assigned=tuple(sums.assigned[i].tolist()),
            dispatched=tuple(sums.dispatched[i].tolist()),
            dropped=int(sums.assigned[i].sum() - sums.dispatched[i].sum()),
            max_over_mean=_ratio(loads[i].max(), mean[i]),
            coefficient_of_variation=_ratio(deviation[i], mean[i]),
            entropy=float(entropy[i]),
            entropy_share=float(entropy[i]) / math.log(num_experts) if num_experts > 1 else 0.0,
            auxiliary_loss=float(auxiliary[i]),
            mean_probability=tuple(probabilities[i].tolist()),
            effective_batch=_ratio(sums.dispatched[i].sum(), sums.hits[i].sum()),
            distinct_experts=_ratio(sums.hits[i].sum(), sums.steps),
        )
        for i in range(sums.assigned.shape[0])
    )
    return RoutingStats(tokens=tokens, steps=steps, pooled_auxiliary_loss=pooled_loss(sums), layers=layers)


def window(snapshot: RoutingSnapshot) -> Sums:
    """The sums over the steps of the sliding window."""
    return Sums(*(tensor.sum(dim=0) for tensor in snapshot.window.tensors()))


def pooled_loss(sums: Sums) -> float:
    """The auxiliary loss as transformers' `load_balancing_loss_func` has it for Mixtral: over all layers together.

    E * sum over choices k and experts i of (tokens whose k-th choice is i / N) * (mean probability of i), N being
    tokens times layers: the sum over k is the number of assignments over N, so 2.0 is even for top-2.
    """
    num_layers, num_experts = sums.assigned.shape
    rows = max(int(sums.tokens), 1) * num_layers
    fractions = sums.assigned.double().sum(dim=0) / rows
    probabilities = sums.probability.sum(dim=0) / rows
    return float(num_experts * (fractions * probabilities).sum())


def what_if(snapshot: RoutingSnapshot, capacity_factor: float) -> CapacityWhatIf:
    """Assignments that a capacity factor would have made overflow.

    Exact over the window: the sum over its steps of max(0, n - C) with C = ceil(c * K * T / E). Since start only the
    load histogram is left: it answers for C = c * K * T / E, not rounded up, and is exact for factors on a bucket's
    bound and too low by at most the one bucket that the factor falls into otherwise.
    """
    num_experts = snapshot.total.assigned.shape[1]
    limits = capacity(snapshot.top_k, num_experts, capacity_factor, snapshot.window.tokens)
    over = (snapshot.window.assigned.double() - limits[:, None, None]).clamp(min=0).sum(dim=0)
    lower = torch.cat((torch.zeros(1, dtype=torch.float64), bucket_bounds(num_experts)))
    beyond = snapshot.load_assigned - capacity_factor * snapshot.load_share
    since = torch.where(lower >= capacity_factor, beyond, 0.0).clamp(min=0).sum(dim=-1)
    return CapacityWhatIf(
        capacity_factor=capacity_factor,
        window_steps=int(snapshot.window.steps.sum()),
        window_assigned=int(snapshot.window.assigned.sum()),
        window_overflow=_table(over.long()),
        total_assigned=int(snapshot.total.assigned.sum()),
        total_overflow=_table(since),
    )


def _table(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def _ratio(value: Tensor, by: Tensor) -> float:
    return float(value) / float(by) if float(by) else 0.0
