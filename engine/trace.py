"""What single requests are told of a step's routing: traces, and how many experts worked for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.routing.record import RoutingRecord
from engine.scheduler import Chunk, StepPlan
from engine.transfers import to_device, to_host
from engine.types import TokenRouting


@dataclass(frozen=True, slots=True)
class Traces:
    """The routing of tokens that requests trace, in host memory once it has arrived (engine/transfers.py)."""

    counts: dict[int, int]
    """Tokens of each chunk that traces, by its index, in order; R in all."""
    expert_ids: Tensor  # [R, L, K] int32
    weights: Tensor  # [R, L, K] float32
    entropy: Tensor  # [R, L] float32

    def read(self) -> dict[int, list[TokenRouting]]:
        """By the chunk's index."""
        columns = (self.expert_ids.tolist(), self.weights.tolist(), self.entropy.tolist())
        tokens = [_token_routing(*column) for column in zip(*columns, strict=True)]
        traces: dict[int, list[TokenRouting]] = {}
        for index, count in self.counts.items():
            traces[index], tokens = tokens[:count], tokens[count:]
        return traces


@dataclass(frozen=True, slots=True)
class Visits:
    """How many experts computed for each token of a step, over all layers; as `Traces` in host memory."""

    plan: StepPlan
    by_token: Tensor  # [T] int64

    def read(self) -> dict[int, int]:
        """For each chunk of a steered request, by its index."""
        parts = torch.split(self.by_token, [chunk.num_tokens for chunk in self.plan.chunks])
        return {
            index: int(part.sum())
            for index, (chunk, part) in enumerate(zip(self.plan.chunks, parts, strict=True))
            if chunk.sequence.request.steering is not None
        }


def trace(plan: StepPlan, record: RoutingRecord, max_top_k: int) -> Traces | None:
    """The routing that requests trace of a step, which is in `record`: `max_top_k` places a token.

    With the prompt traced those are all tokens of a prompt chunk; otherwise only the last, and only when it samples.
    """
    counts: dict[int, int] = {}
    rows: list[int] = []
    first = 0
    for index, chunk in enumerate(plan.chunks):
        reported = _reported_rows(chunk, first)
        if reported:
            counts[index] = len(reported)
            rows += reported
        first += chunk.num_tokens
    if not rows:
        return None
    found = record.rows(to_device(rows, torch.int64, record.logits.device), max_top_k)
    return Traces(counts, *(to_host(tensor) for tensor in found))


def expert_visits(plan: StepPlan, record: RoutingRecord, max_top_k: int) -> Visits | None:
    """Of a step with steered requests, which is in `record`."""
    if all(chunk.sequence.request.steering is None for chunk in plan.chunks):
        return None
    return Visits(plan, to_host(record.visits(plan.num_tokens, max_top_k)))


def _reported_rows(chunk: Chunk, first: int) -> Sequence[int]:
    request, end = chunk.sequence.request, first + chunk.num_tokens
    # With the first token the prompt's trace is sent, and a preemption after that needs no second one.
    if request.trace_prompt_routing and chunk.sequence.num_output == 0:
        return range(first, end)
    return range(end - 1, end) if request.trace_routing and chunk.samples else ()


def _token_routing(expert_ids: list[list[int]], weights: list[list[float]], entropy: list[float]) -> TokenRouting:
    """One token's [L][K] and [L], without the unused places."""
    used = [[k for k, expert in enumerate(layer) if expert >= 0] for layer in expert_ids]
    return TokenRouting(
        tuple(tuple(layer[k] for k in places) for layer, places in zip(expert_ids, used, strict=True)),
        tuple(tuple(layer[k] for k in places) for layer, places in zip(weights, used, strict=True)),
        tuple(entropy),
    )
