"""What the sums of a routing record say: balance, entropy, losses, and the capacity that traffic would have needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.routing.capacity import capacity
from engine.routing.record import RoutingSnapshot, Sums, capacity_factors
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
    """Assignments that a capacity factor would have made overflow: the sum over steps of max(0, n - C), with
    C = ceil(c * K * T / E).

    Exact over the window, for any factor. Since the start only the sums for a table of factors are left: the answer is
    exact for the largest of them that is not above the factor, which it names, and so no less than the truth for the
    factor itself (for one below the whole table, no more than the truth).
    """
    num_experts = snapshot.total.assigned.shape[1]
    limits = capacity(snapshot.top_k, num_experts, capacity_factor, snapshot.window.tokens)
    # In float64: a limit may be any factor's, beyond all integers.
    over = (snapshot.window.assigned.double() - limits[:, None, None]).clamp(min=0).sum(dim=0).long()
    factors = capacity_factors()
    row = max(0, int(torch.searchsorted(factors, capacity_factor, right=True)) - 1)
    return CapacityWhatIf(
        capacity_factor=capacity_factor,
        window_steps=int(snapshot.window.steps.sum()),
        window_assigned=int(snapshot.window.assigned.sum()),
        window_overflow=_table(over),
        total_capacity_factor=float(factors[row]),
        total_assigned=int(snapshot.total.assigned.sum()),
        total_overflow=_table(snapshot.overflow[row]),
    )


def _table(values: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def _ratio(value: Tensor, by: Tensor) -> float:
    return float(value) / float(by) if float(by) else 0.0
