"""SteeringTable: what requests ask of routing, as tensors that a captured graph can read.

A slot holds one way of steering; all requests that ask for the same share it. Slot 0 is the model's own routing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.types import Steering
from weights.config import ModelConfig


class SteeringTable:
    """Static device buffers: `top_k` [S] int64, `min_p` [S] float32, `forbidden` [S, L, E] bool."""

    def __init__(self, *, num_slots: int, num_layers: int, num_experts: int, top_k: int, device: torch.device) -> None:
        self.top_k = torch.full((num_slots,), top_k, dtype=torch.int64, device=device)
        self.min_p = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.forbidden = torch.zeros(num_slots, num_layers, num_experts, dtype=torch.bool, device=device)
        self._model_top_k = top_k
        self._slots: OrderedDict[Steering, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots - 1, 0, -1))

    @classmethod
    def for_model(cls, config: ModelConfig, *, num_slots: int, device: torch.device) -> SteeringTable:
        """A table for batches of fewer than `num_slots` sequences."""
        return cls(
            num_slots=num_slots,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            device=device,
        )

    def slots_of(self, steerings: Sequence[Steering | None]) -> list[int]:
        """The slot of each request of a batch, filled where it is new. A batch has fewer ways of steering than slots.

        Slots of this batch are never taken away for another of it: all of them are touched before any is given up.
        """
        for steering in steerings:
            if steering in self._slots:
                self._slots.move_to_end(steering)  # type: ignore[arg-type]
        return [0 if steering is None else self._slot(steering) for steering in steerings]

    def max_top_k(self, steerings: Sequence[Steering | None]) -> int:
        """The largest K of a batch, on the host."""
        return max(self._model_top_k if s is None else s.experts_per_token or self._model_top_k for s in steerings)

    def _slot(self, steering: Steering) -> int:
        if steering not in self._slots:
            slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
            try:
                self._fill(slot, steering)
            except RuntimeError:  # out of memory: the step is given up, its slot must not be
                self._free.append(slot)
                raise
            self._slots[steering] = slot
        return self._slots[steering]

    def _fill(self, slot: int, steering: Steering) -> None:
        self.top_k[slot] = steering.experts_per_token or self._model_top_k
        self.min_p[slot] = steering.min_p
        forbidden = forbidden_mask(steering, *self.forbidden.shape[1:])
        self.forbidden[slot] = forbidden.to(self.forbidden.device, non_blocking=True)


def forbidden_mask(steering: Steering, num_layers: int, num_experts: int) -> Tensor:
    """[L, E] bool: which experts `steering` forbids where."""
    mask = torch.zeros(num_layers, num_experts, dtype=torch.bool)
    for layer, experts in steering.forbidden:
        rows = slice(None) if layer is None else layer
        mask[rows, list(experts)] = True
    return mask
