"""Routing: which experts serve which token, and with what weight; and the seam that routers implement.

T tokens, E experts, K_max the largest number of experts a token may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided. A place that is not used has `expert_ids` -1 and weight 0, and no backend computes it."""

    expert_ids: Tensor  # [T, K_max] int32
    weights: Tensor  # [T, K_max] float32
    logits: Tensor  # [T, E] as the gate produced them


class Router(Protocol):
    """Logits of the gate -> Routing. All arithmetic on gates is float32."""

    def __call__(self, logits: Tensor) -> Routing:
        """`logits` [T, E] in the model's dtype."""
        ...
