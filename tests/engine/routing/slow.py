"""The papers' algorithms and SplitMix64 over Python numbers: slow, and what the tensor code must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

_WORD = (1 << 64) - 1


def mix(state: int) -> int:
    """The next output of a SplitMix64 generator with that state, all in unsigned 64-bit words."""
    z = (state + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def bits(seed: int, position: int, layer: int, index: int) -> int:
    """64 random bits of that seed (signed), position, layer and index."""
    return mix(mix(mix(mix(seed & _WORD) ^ position) ^ layer) ^ index)


def uniform(seed: int, position: int, layer: int, index: int) -> float:
    return (bits(seed, position, layer, index) >> 40) / 2**24


def softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(logit - most) for logit in logits]
    return [power / sum(powers) for power in powers]


def best(values: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest; of equals the lower first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def limit(capacity_factor: float | None, top_k: int, num_tokens: int, num_experts: int) -> float:
    """ceil(c * K * T / E) without rounding on the way."""
    if capacity_factor is None:
        return math.inf
    return math.ceil(Fraction(capacity_factor) * top_k * num_tokens / num_experts)


@dataclass
class Row:
    """One token: whom it chose, with what weight, and whether the choice is computed."""

    chosen: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def expert_ids(self) -> list[int]:
        return [expert if kept else -1 for expert, kept in zip(self.chosen, self.kept, strict=True)]

    def kept_weights(self) -> list[float]:
        return [weight if kept else 0.0 for weight, kept in zip(self.weights, self.kept, strict=True)]


def switch(logits: Sequence[Sequence[float]], capacity_factor: float | None) -> list[Row]:
    """Fedus et al. 2021, section 2.2: to the best expert, in order, as long as it has room."""
    num_tokens, num_experts = len(logits), len(logits[0])
    room = limit(capacity_factor, 1, num_tokens, num_experts)
    counts = [0] * num_experts
    rows = []
    for token in logits:
        probabilities = softmax(token)
        (expert,) = best(token, 1)
        rows.append(Row([expert], [probabilities[expert]], [counts[expert] < room]))
        counts[expert] += 1
    return rows


def gshard(logits: Sequence[Sequence[float]], capacity_factor: float | None, draws: Sequence[float]) -> list[Row]:
    """Lepikhin et al. 2020, Algorithm 1, for one group: `draws` has the uniform number of each token."""
    num_tokens, num_experts = len(logits), len(logits[0])
    room = limit(capacity_factor, 2, num_tokens, num_experts)
    counts = [0] * num_experts
    rows = []
    for token in logits:
        gates = softmax(token)
        first, second = best(token, 2)
        total = gates[first] + gates[second]
        row = Row([first, second], [gates[first] / total, gates[second] / total])
        row.kept.append(counts[first] < room)
        counts[first] += 1
        rows.append(row)
    for row, draw in zip(rows, draws, strict=True):
        second = row.chosen[1]
        row.kept.append(counts[second] < room and 2 * row.weights[1] > draw)
        counts[second] += 1
    return rows
