"""Times of the experts of a layer and of its routing, and how near they come to a copy and to a product."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from engine.backends.cuda.moe import ExpertWeights, experts
from engine.backends.cuda.routing import group_blocks, route
from engine.backends.cuda.tiles import ExpertTiles, TileTable
from engine.routing.base import Routing
from engine.routing.record import RoutingRecord
from engine.routing.simulated import SIMULATIONS
from tests.bench.card import references
from tests.bench.card.bench import Bench
from tests.bench.card.inputs import expert_weights, normal, routing_inputs, simulated
from weights.config import ModelConfig

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY_ROWS = (1, 7)
TOLERANCE = {4: 1e-4, 2: 0.01, 1: 0.06}
"""By bytes of a weight: grouped products of 8 bits round the activations too, by about 3 % in each of the two."""


def weight_dtypes(bench: Bench) -> list[torch.dtype]:
    """The model's own, and those of 8 bits that the card has."""
    return list(dict.fromkeys([bench.dtype, bench.card.weight_dtype("fp8") or bench.dtype, torch.int8]))


def expert_times(bench: Bench) -> None:
    for weight_dtype in weight_dtypes(bench):
        weights = make_weights(bench, weight_dtype)
        table = tile_table(bench, weight_dtype)
        for num_rows, pattern in product(TINY_ROWS if bench.tiny else ROWS, SIMULATIONS):
            keys = {"weights": _name(weights), "routing": pattern, "rows": num_rows}
            if bench.is_due("experts", keys):
                _time(bench, weights, table.choose(num_rows), num_rows, pattern)


def make_weights(bench: Bench, weight_dtype: torch.dtype) -> ExpertWeights:
    """Of one layer."""
    model = bench.model
    return expert_weights(
        model.num_experts,
        model.hidden_size,
        model.intermediate_size,
        device=bench.device,
        dtype=bench.dtype,
        weight_dtype=weight_dtype,
    )


def tile_table(bench: Bench, weight_dtype: torch.dtype) -> TileTable:
    return TileTable.load(
        capability=bench.card.capability,
        dtype=bench.dtype,
        weight_dtype=weight_dtype,
        hidden_size=bench.model.hidden_size,
        intermediate_size=bench.model.intermediate_size,
    )


def _time(bench: Bench, weights: ExpertWeights, tiles: ExpertTiles, num_rows: int, pattern: str) -> None:
    model = bench.model
    routing = simulated(pattern, num_rows, model.num_experts, model.num_experts_per_tok, bench.device)
    x = normal(num_rows, model.hidden_size, device=bench.device, dtype=bench.dtype)
    run = runner(x, weights, routing, tiles, residual := torch.zeros_like(x))
    run()
    error = references.relative_error(residual, references.experts(x, weights, routing))
    name = _name(weights)
    bench.check(f"experts {name} {pattern} {num_rows}", error, TOLERANCE[weights.w13.dtype.itemsize])
    distinct = len(set(routing.expert_ids.flatten().tolist()))
    bench.time(
        "experts",
        {"weights": name, "routing": pattern, "rows": num_rows, "distinct": distinct, "grouped": tiles.grouped},
        run,
        num_bytes=distinct * expert_bytes(weights),
        operations=expert_operations(model, num_rows),
        error=error,
    )


def _name(weights: ExpertWeights) -> str:
    return str(weights.w13.dtype).removeprefix("torch.")


def runner(x: Tensor, weights: ExpertWeights, routing: Routing, tiles: ExpertTiles, residual: Tensor) -> partial[None]:
    """The call that adds the experts' results to `residual`."""
    blocks = group_blocks(routing.expert_ids, weights.w13.shape[0], tiles.block_m)
    return partial(experts, x, weights, routing.expert_ids, routing.weights, blocks, residual, tiles)


def expert_bytes(weights: ExpertWeights) -> int:
    """Of one expert."""
    return (weights.w13.nbytes + weights.w2.nbytes) // weights.w13.shape[0]


def expert_operations(model: ModelConfig, num_rows: int) -> int:
    return 6 * model.hidden_size * model.intermediate_size * num_rows * model.num_experts_per_tok


def route_times(bench: Bench) -> None:
    """Routing, its record and the grouping of the experts together."""
    model = bench.model
    for num_rows in TINY_ROWS if bench.tiny else ROWS:
        if not bench.is_due("route", {"rows": num_rows}):
            continue
        inputs = routing_inputs(num_rows, model.num_experts, model.num_experts_per_tok, bench.device)
        record = RoutingRecord(
            num_layers=1,
            num_experts=model.num_experts,
            top_k=model.num_experts_per_tok,
            max_tokens=num_rows,
            device=bench.device,
        )
        logits = normal(num_rows, model.num_experts, device=bench.device, dtype=bench.dtype)
        block_m = tile_table(bench, bench.dtype).choose(num_rows).block_m
        run = partial(route, logits, 0, inputs, renormalize=True, block_m=block_m, record=record)
        bench.time("route", {"rows": num_rows}, run)
