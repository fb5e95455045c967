"""Routing: which experts serve which token, and with what weight; and the seam that routers implement.

T tokens of the batch (padding included), S steering slots, L layers, E experts, K_max the most experts any token may
have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided. A place that is not used has `expert_ids` -1 and weight 0, and no backend computes it.

    `chosen_ids` differs from `expert_ids` where a choice was dropped for want of capacity, or by chance: it still says
    whom the token wanted. Without drops it is the same tensor.
    """

    expert_ids: Tensor  # [T, K_max] int32
    weights: Tensor  # [T, K_max] float32
    logits: Tensor  # [T, E] as the gate produced them
    chosen_ids: Tensor  # [T, K_max] int32

    @classmethod
    def keeping(cls, kept: Tensor, chosen_ids: Tensor, weights: Tensor, logits: Tensor) -> Routing:
        """The choices where `kept` [T, K_max] bool is true; the others are dropped, and remembered as chosen."""
        return cls(torch.where(kept, chosen_ids, -1), torch.where(kept, weights, 0.0), logits, chosen_ids)


@dataclass(frozen=True, slots=True)
class RoutingInputs:
    """What routing takes beside logits: the same object for every layer of a step, all tensors on the device.

    Tokens share the steering of their request through `slots`: token t may have top_k[slots[t]] experts, none of those
    with forbidden[slots[t], layer, expert], and none less probable than min_p[slots[t]] times its best one.
    """

    num_valid_tokens: Tensor  # [] int64: rows from here on are padding
    slots: Tensor  # [T] int64
    top_k: Tensor  # [S] int64, at least 1; slot 0 is the model's own K
    min_p: Tensor  # [S] float32, 0: off
    forbidden: Tensor  # [S, L, E] bool
    seeds: Tensor  # [T] int64: the random stream of the token's request
    positions: Tensor  # [T] int64: the token's position in its sequence, the counter of that stream
    max_top_k: int
    """K_max of this step, on the host: no less than the largest of top_k over the slots in use."""


@dataclass(frozen=True, slots=True)
class GateOutput:
    """What the gates of one layer computed, in the model's dtype."""

    logits: Tensor  # [T, E]
    noise: Tensor | None  # [T, E] of the noise gate, where the router draws noise and the checkpoint has one


class Router(Protocol):
    """Gates -> Routing. All arithmetic on gates is float32."""

    @property
    def max_choices(self) -> int:
        """The most experts a request may ask for."""
        ...

    @property
    def draws(self) -> bool:
        """Whether the result depends on random numbers."""
        ...

    @property
    def capacity_factor(self) -> float | None:
        """None: no limit on the tokens of an expert."""
        ...

    def __call__(self, gates: GateOutput, layer: int, inputs: RoutingInputs) -> Routing:
        """Route all tokens of a step in one layer."""
        ...
