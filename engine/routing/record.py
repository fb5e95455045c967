"""RoutingRecord: what every router of a step decided, in static device buffers, and what traffic adds up to.

Each layer writes its routing into the buffers; after the forward pass one reduction over all layers adds the step to
the totals and to a ring of the last steps. Nothing here synchronises with the device until somebody asks for a
snapshot, and rows from `num_valid_tokens` on, padding, are never counted. Experts are counted by their logical id.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.routing.base import Routing, RoutingInputs
from engine.routing.capacity import capacity

WINDOW_STEPS = 512
"""Steps in the sliding window."""
CAPACITY_STEPS = 80
"""Capacity factors 0.05, 0.10, … 4.00, for each of which overflow is added up since the start."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What is added up over the valid tokens of one or more steps. L layers, E experts."""

    steps: Tensor  # [] int64
    tokens: Tensor  # [] int64: rows that were routed in each layer, recomputed ones included
    assigned: Tensor  # [L, E] int64: choices of the router
    dispatched: Tensor  # [L, E] int64: choices that were computed
    hits: Tensor  # [L, E] int64: steps in which the expert computed anything
    probability: Tensor  # [L, E] float64: softmax of the logits
    entropy: Tensor  # [L] float64: -sum p ln p, in nats

    @classmethod
    def zeros(cls, *lead: int, num_layers: int, num_experts: int, device: torch.device) -> Sums:
        """Zeros, with the dimensions `lead` in front of each field's own."""
        shapes = {"steps": (), "tokens": (), "entropy": (num_layers,)}
        return cls(
            **{
                field.name: torch.zeros(
                    (*lead, *shapes.get(field.name, (num_layers, num_experts))),
                    dtype=torch.float64 if field.name in ("probability", "entropy") else torch.int64,
                    device=device,
                )
                for field in fields(cls)
            }
        )

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def over_steps(self) -> Sums:
        """The rows of a leading dimension, one a step, added up."""
        return Sums(*(tensor.sum(dim=0) for tensor in self.tensors()))


@dataclass(frozen=True, slots=True)
class RoutingSnapshot:
    """Totals since the start or the last reset, and the last steps one by one; tensors on the CPU."""

    total: Sums
    window: Sums  # every field with a leading [W]: one row a step, oldest first
    overflow: Tensor  # [CAPACITY_STEPS, L, E] int64: what each of the `capacity_factors` would have dropped since start
    top_k: int  # the model's K


class RoutingRecord:
    """One rank's record. `max_tokens` is the most rows a step may have."""

    def __init__(self, *, num_layers: int, num_experts: int, top_k: int, max_tokens: int, device: torch.device) -> None:
        self.top_k = top_k
        self._num_experts = num_experts
        shape = (num_layers, max_tokens, num_experts)
        self.logits = torch.zeros(shape, dtype=torch.float32, device=device)
        self.expert_ids = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.chosen_ids = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self.num_valid_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._factors = capacity_factors().to(device)
        self._total = Sums.zeros(num_layers=num_layers, num_experts=num_experts, device=device)
        self._ring = Sums.zeros(WINDOW_STEPS, num_layers=num_layers, num_experts=num_experts, device=device)
        self._overflow = torch.zeros((CAPACITY_STEPS, num_layers, num_experts), dtype=torch.int64, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)  # steps so far: a captured step advances it

    def reset(self) -> None:
        """Forget all traffic. The buffers stay where they are."""
        for tensor in (*self._total.tensors(), *self._ring.tensors(), self._overflow, self._cursor):
            tensor.zero_()

    def write(self, layer: int, routing: Routing) -> None:
        """Keep one layer's routing of this step. Columns from its K_max on are not read in this step."""
        rows, width = routing.expert_ids.shape
        self.logits[layer, :rows] = routing.logits
        self.expert_ids[layer, :rows, :width] = routing.expert_ids
        self.chosen_ids[layer, :rows, :width] = routing.chosen_ids
        self.weights[layer, :rows, :width] = routing.weights

    def reduce(self, inputs: RoutingInputs) -> None:
        """Add the step to totals, ring and overflow table."""
        rows, width = inputs.slots.shape[0], min(inputs.max_top_k, self._num_experts)
        self.num_valid_tokens.copy_(inputs.num_valid_tokens)
        valid = torch.arange(rows, device=self.logits.device) < self.num_valid_tokens
        probability = _probability(self.logits[:, :rows]) * valid.unsqueeze(-1)
        assigned = self._count(self.chosen_ids[:, :rows, :width], valid)
        dispatched = self._count(self.expert_ids[:, :rows, :width], valid)
        step = Sums(
            steps=torch.ones((), dtype=torch.int64, device=valid.device),
            tokens=self.num_valid_tokens,
            assigned=assigned,
            dispatched=dispatched,
            hits=(dispatched > 0).long(),
            probability=probability.sum(dim=1, dtype=torch.float64),
            entropy=torch.special.entr(probability).sum(dim=(1, 2), dtype=torch.float64),
        )
        for total, ring, value in zip(self._total.tensors(), self._ring.tensors(), step.tensors(), strict=True):
            total += value
            ring.index_copy_(0, self._cursor % WINDOW_STEPS, value.unsqueeze(0))
        self._cursor += 1
        limits = capacity(self.top_k, self._num_experts, self._factors, self.num_valid_tokens)
        self._overflow += (assigned - limits.long()[:, None, None]).clamp_(min=0)

    def total(self) -> Sums:
        """Everything since the start or the last reset, on the CPU; waits for the device."""
        return Sums(*(tensor.clone().cpu() for tensor in self._total.tensors()))

    def window(self) -> Sums:
        """The last WINDOW_STEPS steps together, on the CPU; waits for the device."""
        return Sums(*(tensor.cpu() for tensor in self._ring.over_steps().tensors()))

    def snapshot(self) -> RoutingSnapshot:
        """Copies on the CPU; waits for the device."""
        end = int(self._cursor)
        order = torch.arange(max(0, end - WINDOW_STEPS), end) % WINDOW_STEPS
        return RoutingSnapshot(
            total=self.total(),
            window=Sums(*(tensor.cpu()[order] for tensor in self._ring.tensors())),
            overflow=self._overflow.clone().cpu(),
            top_k=self.top_k,
        )

    def rows(self, rows: Tensor, max_top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The routing of some rows [R] int64 of this step, for a trace: expert ids and weights [R, L, K] and entropy
        [R, L]."""
        expert_ids = self.expert_ids[:, rows, :max_top_k].transpose(0, 1)
        weights = self.weights[:, rows, :max_top_k].transpose(0, 1)
        entropy = torch.special.entr(_probability(self.logits[:, rows])).sum(-1).T
        return expert_ids, weights, entropy

    def visits(self, num_rows: int, max_top_k: int) -> Tensor:
        """How many experts computed for each row, over all layers: [num_rows] int64."""
        return (self.expert_ids[:, :num_rows, :max_top_k] >= 0).sum(dim=(0, 2))

    def _count(self, expert_ids: Tensor, valid: Tensor) -> Tensor:
        """Assignments [L, T, K] of valid rows to each expert: [L, E] int64."""
        keys = torch.where(valid.unsqueeze(-1), expert_ids, -1).flatten(1).long() + 1
        counts = torch.zeros(keys.shape[0], self._num_experts + 1, dtype=torch.int64, device=keys.device)
        return counts.scatter_add_(1, keys, torch.ones_like(keys))[:, 1:]


def _probability(logits: Tensor) -> Tensor:
    """Softmax over the experts. A token whose gates overflowed, and padding that was never written, has none: one NaN
    would spoil all sums to come."""
    return torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)


def capacity_factors() -> Tensor:
    """[CAPACITY_STEPS] float64. Twentieths, so that the factors people ask for are among them to the last bit."""
    return torch.arange(1, CAPACITY_STEPS + 1, dtype=torch.float64) / 20
