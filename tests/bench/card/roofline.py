"""The bytes that a decode step cannot but read, and so the time that it takes at least."""

from __future__ import annotations

from dataclasses import dataclass

from engine.types import MemoryUse


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of one step. Activations, next to nothing in a decode step, and the embedding's few rows are left out."""

    experts: float
    """Of the experts that had a token, in the layers where they had one."""
    dense: float
    """Of all weights that every token goes through: attention, norms, routers, the vocabulary projection."""
    kv_cache: float

    @property
    def total(self) -> float:
        return self.experts + self.dense + self.kv_cache


def step_bytes(memory: MemoryUse, *, num_experts: int, kv_tokens: int, hits: float, positions: float) -> StepBytes:
    """`num_experts` of all layers together, whose weights `memory` has; `kv_tokens`, which its cache holds; `hits`,
    experts that had a token, added up over the layers; `positions`, lengths of the contexts, added up.

    Example: Mixtral 8x7B in bfloat16, one sequence of 1,000 tokens, two experts in each of 32 layers. 64 experts of
    352 MB, 2.95 GB of other weights and 1,000 times 131 kB of keys and values: 25.6 GB.
    """
    weights = memory.weights
    head = weights["lm_head"] if "lm_head" in weights else weights["embedding"]  # tied
    return StepBytes(
        experts=hits * weights["expert"] / num_experts,
        dense=weights["attention"] + weights["norm"] + weights["router"] + head,
        kv_cache=positions * memory.kv_cache / kv_tokens,
    )
