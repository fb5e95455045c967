"""What single requests are told of a step's routing: traces, and how many experts worked for them."""

from __future__ import annotations

import torch

from engine.batch import Batch
from engine.routing.record import RoutingRecord
from engine.scheduler import Chunk, StepPlan
from engine.types import TokenRouting


def trace(plan: StepPlan, record: RoutingRecord, batch: Batch) -> dict[int, list[TokenRouting]]:
    """For each chunk whose request traces: the routing of its tokens that are reported, in order.

    With the prompt traced those are all tokens of a prompt chunk; otherwise only the last, and only when it samples.
    """
    wanted: list[tuple[int, range]] = []
    first = 0
    for index, chunk in enumerate(plan.chunks):
        rows = _reported_rows(chunk, first)
        if rows:
            wanted.append((index, rows))
        first += chunk.num_tokens
    if not wanted:
        return {}
    select = torch.tensor([row for _, rows in wanted for row in rows], device=batch.input_ids.device)
    expert_ids, weights, entropy = record.rows(select, batch.routing.max_top_k)
    tokens = [
        _token_routing(ids, values, entropies)
        for ids, values, entropies in zip(expert_ids.tolist(), weights.tolist(), entropy.tolist(), strict=True)
    ]
    traces: dict[int, list[TokenRouting]] = {}
    for index, rows in wanted:
        traces[index], tokens = tokens[: len(rows)], tokens[len(rows) :]
    return traces


def expert_visits(plan: StepPlan, record: RoutingRecord, batch: Batch) -> dict[int, int]:
    """For each chunk of a steered request: experts that computed, over its tokens and all layers."""
    if all(chunk.sequence.request.steering is None for chunk in plan.chunks):
        return {}
    visits = record.visits(batch.num_tokens, batch.routing.max_top_k).cpu()
    parts = torch.split(visits, batch.query_lens)
    return {
        index: int(part.sum())
        for index, (chunk, part) in enumerate(zip(plan.chunks, parts, strict=True))
        if chunk.sequence.request.steering is not None
    }


def _reported_rows(chunk: Chunk, first: int) -> range:
    request, end = chunk.sequence.request, first + chunk.num_tokens
    # With the first token the prompt's trace is sent, and a preemption after that needs no second one.
    if request.trace_prompt_routing and chunk.sequence.num_output == 0:
        return range(first, end)
    return range(end - 1, end) if request.trace_routing and chunk.samples else range(0)


def _token_routing(expert_ids: list[list[int]], weights: list[list[float]], entropy: list[float]) -> TokenRouting:
    """One token's [L][K] and [L], without the unused places."""
    used = [[k for k, expert in enumerate(layer) if expert >= 0] for layer in expert_ids]
    return TokenRouting(
        tuple(tuple(layer[k] for k in places) for layer, places in zip(expert_ids, used, strict=True)),
        tuple(tuple(layer[k] for k in places) for layer, places in zip(weights, used, strict=True)),
        tuple(entropy),
    )
