"""Steps of made-up routing for the record, and naive counting over them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.routing.base import Routing
from engine.routing.record import RoutingRecord
from engine.types import Steering
from tests.engine.routing.inputs import CPU, make_inputs

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
LAYERS, EXPERTS, TOP_K, MAX_TOKENS = 3, 5, 2, 12


@dataclass(frozen=True)
class Step:
    """What the routers of one step decided: tensors [L, T, ...], rows from `num_valid` on are padding."""

    num_valid: int
    logits: torch.Tensor
    expert_ids: torch.Tensor
    chosen_ids: torch.Tensor

    @property
    def max_top_k(self) -> int:
        return self.chosen_ids.shape[2]

    def counts(self, ids: torch.Tensor) -> Counts:
        """[L, E], by walking over rows."""
        result = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        for layer in range(LAYERS):
            for row in ids[layer, : self.num_valid].tolist():
                for expert in row:
                    if expert >= 0:
                        result[layer, expert] += 1
        return result

    def probabilities(self) -> Floats:
        """[L, num_valid, E]"""
        powers = np.exp(self.logits[:, : self.num_valid].double().numpy())
        return np.asarray(powers / powers.sum(-1, keepdims=True))


def make_step(generator: torch.Generator, *, skew: float = 1.0) -> Step:
    """Random gates; K of the step from 1 to E; a fifth of the places is not used, a fifth of the rest is dropped."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_rows, max_top_k = integer(1, MAX_TOKENS), integer(1, EXPERTS)
    logits = torch.randn(LAYERS, num_rows, EXPERTS, generator=generator)
    logits[..., 0] += skew
    order = logits.argsort(-1, descending=True)[..., :max_top_k].int()
    unused = torch.rand(order.shape, generator=generator) < 0.2
    dropped = torch.rand(order.shape, generator=generator) < 0.2
    chosen = order.masked_fill(unused, -1)
    return Step(integer(1, num_rows), logits, chosen.masked_fill(dropped, -1), chosen)


@functools.cache
def make_steps(count: int, seed: int = 0) -> list[Step]:
    generator = torch.Generator().manual_seed(seed)
    return [make_step(generator) for _ in range(count)]


def added(arrays: Iterable[Counts]) -> Counts:
    """The sum over steps of something [L, E]."""
    return np.asarray(np.sum(list(arrays), axis=0))


def make_record() -> RoutingRecord:
    return RoutingRecord(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, max_tokens=MAX_TOKENS, device=CPU)


def observe(record: RoutingRecord, step: Step) -> None:
    num_rows = step.logits.shape[1]
    steering = Steering(experts_per_token=step.max_top_k)
    inputs = make_inputs([steering] * num_rows, num_experts=EXPERTS, top_k=TOP_K, num_valid=step.num_valid)
    for layer in range(LAYERS):
        weights = (step.expert_ids[layer] >= 0).float()
        record.write(layer, Routing(step.expert_ids[layer], weights, step.logits[layer], step.chosen_ids[layer]))
    record.reduce(inputs)


def recorded(steps: Sequence[Step]) -> RoutingRecord:
    record = make_record()
    for step in steps:
        observe(record, step)
    return record
