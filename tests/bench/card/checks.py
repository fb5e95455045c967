"""Every kernel against torch's operations in float32, over sizes that are no multiple of anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch

from engine.backends.cuda.attention import AttentionTiles, attention
from engine.backends.cuda.routing import ExpertBlocks, group_blocks, route
from engine.backends.cuda.rows import add_rms_norm_launch, rms_norm_launch, rotary_angles, rotary_write_launch
from engine.backends.cuda.tiles import ExpertTiles
from engine.layers.rotary import inverse_frequencies
from engine.routing.base import GateOutput, Routing
from engine.routing.record import RoutingRecord
from engine.routing.topk_softmax import TopKSoftmax
from tests.bench.card import references
from tests.bench.card.bench import Bench
from tests.bench.card.expert_times import TOLERANCE as EXPERT_TOLERANCE
from tests.bench.card.expert_times import runner, tile_table, weight_dtypes
from tests.bench.card.inputs import Cache, expert_weights, normal, routing_inputs
from tests.bench.card.references import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


def checks(bench: Bench) -> None:
    """Rows of "checks": every error and its tolerance."""
    for dtype in (torch.float32, torch.float16, bench.dtype) if bench.tiny else (torch.float16, bench.dtype):
        _norms(bench, dtype)
        _rotary(bench, dtype)
        _attention(bench, dtype)
    for num_rows in (1, 13, 70) if bench.tiny else (1, 13, 300, 9000):
        for renormalize in (True, False):
            _route(bench, num_rows, renormalize=renormalize)
    _experts(bench)


def _report(bench: Bench, name: str, error: float, tolerance: float) -> None:
    if not bench.part.rows("checks", kernel=name):  # of the run that this one resumes
        bench.part.row("checks", kernel=name, error=error, tolerance=tolerance)
    bench.check(name, error, tolerance)


def _norms(bench: Bench, dtype: torch.dtype) -> None:
    for num_tokens, hidden in ((1, 33), (7, bench.model.hidden_size)):
        x, y = (normal(num_tokens, hidden, device=bench.device, dtype=dtype, seed=seed) for seed in (1, 2))
        weight = normal(hidden, device=bench.device, dtype=dtype, seed=3)
        rows = torch.arange(num_tokens, device=bench.device).flip(0)
        normed = torch.full_like(x, torch.nan)
        rms_norm_launch(x, weight, EPS, normed, rows=rows).run()
        wanted = references.rms_norm(x[rows], weight, EPS)
        _report(bench, f"norm of rows {dtype} {hidden}", relative_error(normed, wanted), TOLERANCE[dtype])
        total = x + y
        add_rms_norm_launch(x, y, weight, EPS, normed).run()
        wanted = references.rms_norm(total, weight, EPS)
        _report(bench, f"add and norm {dtype} {hidden}", relative_error(normed, wanted), TOLERANCE[dtype])
        _report(bench, f"add {dtype} {hidden}", relative_error(x, total), TOLERANCE[dtype])


def _rotary(bench: Bench, dtype: torch.dtype) -> None:
    shape = replace(bench.shape, num_heads=6, num_kv_heads=2)
    narrow = [] if bench.tiny else eight_bits(bench)  # the interpreter rounds to e4m3 in a way of its own
    for cache_dtype in (dtype, *narrow):
        cache = Cache.random(9, 4, shape, device=bench.device, dtype=cache_dtype)
        batch = cache.batch([(1, 7), (5, 9), (1, 1)])
        qkv = normal(batch.num_tokens, 10 * shape.head_dim, device=bench.device, dtype=dtype)
        heads = qkv.clone().view(batch.num_tokens, 10, shape.head_dim)
        inv_freq = inverse_frequencies(shape.head_dim, 1e6, bench.device)
        cos, sin = rotary_angles(batch.positions, inv_freq)
        rotary_write_launch(qkv, cos, sin, batch.slot_mapping, cache.keys, cache.values, shape).run()
        turned = references.rotary(heads[:, :8], batch.positions, inv_freq)
        query = qkv.view_as(heads)[:, :6]
        _report(bench, f"rotary {dtype} {cache_dtype}", relative_error(query, turned[:, :6]), TOLERANCE[dtype])
        tolerance = TOLERANCE[dtype] if cache_dtype == dtype else 0.05
        for name, part, wanted in (("keys", cache.keys, turned[:, 6:]), ("values", cache.values, heads[:, 8:])):
            written = part.flatten(0, 1)[batch.slot_mapping].float()
            _report(bench, f"write {name} {dtype} {cache_dtype}", relative_error(written, wanted), tolerance)


def _attention(bench: Bench, dtype: torch.dtype) -> None:
    plain = replace(bench.shape, num_heads=6, num_kv_heads=2)
    shapes = [plain, replace(plain, sliding_window=5), replace(plain, num_heads=2), replace(plain, num_kv_heads=1)]
    batches = {
        "decodes": [(1, 9), (1, 1), (1, 30)],
        "mixed": [(1, 17), (7, 7), (4, 13), (1, 2), (70, 75)],
        "segments": [(1, 2000)] if bench.tiny else [(1, 30_000), (1, 5)],
    }
    cases = product((dtype, *eight_bits(bench)), shapes if dtype == bench.dtype else shapes[:2])
    for cache_dtype, shape in cases:
        cache = Cache.random(500 if bench.tiny else 7600, 4, shape, device=bench.device, dtype=cache_dtype)
        k_scale, v_scale = (0.5, 2.0) if cache_dtype != dtype else (1.0, 1.0)
        keys, values = cache.keys.float() * k_scale, cache.values.float() * v_scale
        for batch_name, sizes in batches.items():
            heads = f"{shape.num_heads}/{shape.num_kv_heads} window {shape.sliding_window}"
            name = f"attention {batch_name} {heads} {dtype} {cache_dtype}"
            if not bench.is_due("checks", {"kernel": name}):
                continue
            batch = cache.batch(sizes)
            query = normal(batch.num_tokens, shape.num_heads, shape.head_dim, device=bench.device, dtype=dtype)
            tiles = AttentionTiles.of(bench.card, shape, dtype)
            output = attention(query, cache.keys, cache.values, batch, shape, tiles, k_scale=k_scale, v_scale=v_scale)
            wanted = [references.attention(query, keys, values, batch, shape, row) for row in range(len(sizes))]
            _report(bench, name, relative_error(output, torch.cat(wanted)), 2 * TOLERANCE[dtype])


def eight_bits(bench: Bench) -> list[torch.dtype]:
    """What a cache of 8 bits has, if the card reads it."""
    return [torch.float8_e4m3fn] if bench.card.weight_dtype("fp8") is torch.float8_e4m3fn else []


def _route(bench: Bench, num_rows: int, *, renormalize: bool) -> None:
    """Rows that steer, and equal gates."""
    num_experts, top_k = bench.model.num_experts, bench.model.num_experts_per_tok
    inputs = routing_inputs(num_rows, num_experts, top_k, bench.device, steered=True)
    logits = normal(num_rows, num_experts, device=bench.device, dtype=torch.float32) * 2
    logits[::3] = logits[::3].round()
    record, wanted_record = (
        RoutingRecord(num_layers=1, num_experts=num_experts, top_k=top_k, max_tokens=num_rows, device=bench.device)
        for _ in range(2)
    )
    routing, blocks = route(logits, 0, inputs, renormalize=renormalize, block_m=16, record=record)
    wanted = TopKSoftmax(num_experts, renormalize)(GateOutput(logits, None), 0, inputs)
    wanted_record.write(0, wanted)
    name = f"route {num_rows} renormalize {renormalize}"
    different = int((routing.expert_ids != wanted.expert_ids).sum())
    _report(bench, f"{name}, experts", different, 0)
    _report(bench, f"{name}, weights", relative_error(routing.weights, wanted.weights), 1e-5)
    different = sum(
        int((getattr(record, field) != getattr(wanted_record, field))[:, :, : inputs.max_top_k].sum())
        for field in ("expert_ids", "chosen_ids", "logits")
    )
    _report(bench, f"{name}, record", different, 0)
    _report(bench, f"{name}, blocks", wrong_places(routing.expert_ids, blocks), 0)
    grouped = group_blocks(routing.expert_ids, num_experts, 32)
    _report(bench, f"{name}, grouped", wrong_places(routing.expert_ids, grouped), 0)


def wrong_places(expert_ids: torch.Tensor, blocks: ExpertBlocks) -> int:
    """Places of the blocks whose assignment is not the one it should be: every expert's in order, then padding."""
    flat, size = expert_ids.flatten().tolist(), blocks.block_m
    wanted: list[int] = []
    owners: list[int] = []
    for expert in sorted(set(flat) - {-1}):
        own = [index for index, owner in enumerate(flat) if owner == expert]
        wanted += own + [len(flat)] * (-len(own) % size)
        owners += [expert] * (-(-len(own) // size))
    wanted += [len(flat)] * (blocks.sorted_ids.shape[0] - len(wanted))
    owners += [-1] * (blocks.block_experts.shape[0] - len(owners))
    pairs = zip(blocks.sorted_ids.tolist() + blocks.block_experts.tolist(), wanted + owners, strict=True)
    return sum(actual != expected for actual, expected in pairs)


def _experts(bench: Bench) -> None:
    """Empty experts, unused places, everything to one expert, and every line of the table."""
    num_experts, top_k = 5, 2
    hidden, ffn = (48, 80) if bench.tiny else (336, 272)
    for weight_dtype in weight_dtypes(bench):
        weights = expert_weights(
            num_experts, hidden, ffn, device=bench.device, dtype=bench.dtype, weight_dtype=weight_dtype
        )
        for tiles in _different(tile_table(bench, weight_dtype).lines):
            for num_rows in (1, 5) if bench.tiny else (1, 19, min(tiles.rows, 1024)):
                for routing_name, routing in _routings(bench, num_rows, num_experts, top_k).items():
                    line = f"line {tiles.rows}, grouped {tiles.grouped}"
                    name = f"experts {weight_dtype} {routing_name} {num_rows}, {line}"
                    if not bench.is_due("checks", {"kernel": name}):
                        continue
                    x = normal(num_rows, hidden, device=bench.device, dtype=bench.dtype)
                    run = runner(x, weights, routing, tiles, residual := x.clone())
                    run()
                    wanted = x.float() + references.experts(x, weights, routing)
                    _report(bench, name, relative_error(residual, wanted), EXPERT_TOLERANCE[weight_dtype.itemsize])


def _different(lines: Iterable[ExpertTiles]) -> list[ExpertTiles]:
    """One line of each kind."""
    kinds = {(line.block_m, line.up, line.down, line.grouped): line for line in lines}
    return list(kinds.values())


def _routings(bench: Bench, num_rows: int, num_experts: int, top_k: int) -> dict[str, Routing]:
    """Expert 3 has no token in any of them."""
    logits = normal(num_rows, num_experts, device=bench.device, dtype=torch.float32, seed=num_rows)
    logits[:, 3] = -torch.inf
    weights, ids = logits.softmax(-1).topk(top_k)
    noisy = ids.int()
    gone = normal(num_rows, top_k, device=bench.device, dtype=torch.float32, seed=9) > 0.3
    one = torch.full_like(noisy, -1)
    one[:, 1] = 4
    return {
        "noisy": Routing(noisy, weights, logits, noisy),
        "unused": Routing.keeping(~gone, noisy, weights, logits),
        "one": Routing(one, weights, logits, one),
    }
