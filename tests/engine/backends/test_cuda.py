"""The GPU's backend on the CPU, through Triton's interpreter: layers, and the whole engine, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import startup
from engine.backends.cuda.backend import CudaBackend, why_not
from engine.backends.cuda.card import Card
from engine.batch import build
from engine.core import EngineCore
from engine.models.registry import build_model
from engine.routing.record import RoutingRecord
from engine.routing.select import make_router
from engine.routing.stats import stats
from engine.routing.steering import SteeringTable
from engine.types import Request, Steering
from tests.engine.backends.test_cpu import BATCHES, SHAPES, check, fill_cache, make_plan, reference, used
from tests.engine.cores import greedy, make_core, run, traces
from tests.tiny import TINY_MIXTRAL, tiny_tensors, write_tiny_mixtral
from weights.config import ModelConfig
from weights.families import family_of

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
H100 = Card((9, 0), 132)
BLOCK_SIZE = 4


def make_backend(config: ModelConfig, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> CudaBackend:
    """With the weights of the reference of tests/engine/backends/test_cpu.py."""
    backend = CudaBackend(config, H100, device=CPU, dtype=dtype, weight_dtype=weight_dtype)
    tensors = tiny_tensors(config, seed=3)
    for piece in family_of(config).pieces(config):
        tensor = tensors[piece.source]
        backend.prepare(piece, tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor)
    return backend


def step(
    config: ModelConfig,
    sizes: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    steerings: list[Steering | None] | None = None,
    **router_options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], list[RoutingRecord]]:
    """Logits, keys and values of a step, by the kernels and by the reference, and what both recorded."""
    options: dict[str, Any] = {"router": None, "capacity_factor": None, "simulation": None} | router_options
    router = make_router(config, **options)
    table = SteeringTable.for_model(config, num_slots=len(sizes) + 1, device=CPU)
    plan, num_blocks = make_plan(sizes, steerings or [None] * len(sizes))
    batch = build(plan, block_size=BLOCK_SIZE, steering=table, device=CPU)
    results, records = [], []
    for backend in (make_backend(config, dtype, weight_dtype), reference(config, torch.float32)):
        decoder = build_model(config, backend, router)
        cache = backend.new_kv_cache(config.num_layers, num_blocks, BLOCK_SIZE, decoder.attention_shape)
        fill_cache(cache, config.head_dim, dtype)
        record = RoutingRecord(
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            max_tokens=batch.num_tokens + 3,
            device=CPU,
        )
        with torch.inference_mode():
            hidden = decoder.forward(batch, cache, record)
            logits = decoder.logits(hidden, batch.logits_indices)
            record.reduce(batch.routing)
        results.append((logits.float(), used(cache.keys, batch), used(cache.values, batch)))
        records.append(record)
    return results[0], results[1], records


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    ours, theirs, records = step(SHAPES[shape], BATCHES["mixed"])
    check(ours, theirs, 3e-5)
    check_records(records)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str) -> None:
    ours, theirs, records = step(SHAPES["window"], BATCHES[batch])
    check(ours, theirs, 3e-5)
    check_records(records)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [(torch.float16, None, 0.004), (torch.float32, torch.int8, 0.04), (torch.float16, torch.float8_e4m3fn, 0.12)],
    ids=str,
)
@pytest.mark.parametrize("shape", ["odd", "wide"])
def test_small_types_are_near_the_reference(
    shape: str, dtype: torch.dtype, weight_dtype: torch.dtype | None, tolerance: float
) -> None:
    ours, theirs, _ = step(SHAPES[shape], BATCHES["mixed"], dtype=dtype, weight_dtype=weight_dtype)
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        error = (mine - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 1e-6 < error < tolerance, f"relative error {error:.2e}"


STEERINGS = [
    Steering(experts_per_token=1),
    None,
    Steering(experts_per_token=4, min_p=0.1),
    Steering(forbidden=((1, (0, 2)),)),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "switch", "capacity_factor": 1.0},
        {"router": "gshard", "capacity_factor": 1.25},
        {"router": "noisy_topk"},
        {"capacity_factor": 0.8},
        {"simulation": "zipf"},
    ],
    ids=str,
)
def test_every_router_of_a_steered_batch(options: dict[str, Any]) -> None:
    limited = options.get("router") in ("switch", "gshard")
    steerings: list[Steering | None] = [None if limited else steering for steering in STEERINGS]
    ours, theirs, records = step(TINY_MIXTRAL, [(0, 5), (3, 1), (9, 2), (0, 7)], steerings=steerings, **options)
    check(ours, theirs, 3e-5)
    check_records(records)


def check_records(records: list[RoutingRecord]) -> None:
    ours, theirs = (record.total() for record in records)
    for name in ("steps", "tokens", "assigned", "dispatched", "hits"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.assigned.any()
    torch.testing.assert_close(ours.probability, theirs.probability, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-4)


def test_weights_of_8_bits_are_of_8_bits() -> None:
    config = SHAPES["odd"]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        weights = make_backend(config, torch.float16, dtype)._experts.weights(1)
        assert weights.w13.dtype == weights.w2.dtype == dtype
        assert weights.w13_scale is not None
        assert weights.w13_scale.shape == (4, 2 * config.intermediate_size)
        exact = reference(config, torch.float32)._params["layers.1.w13"]
        wide = weights.w13.float() * weights.w13_scale.unsqueeze(-1)
        assert (wide - exact).norm() / exact.norm() < 0.04
        assert make_backend(config, torch.float16, dtype).linear("layers.0.gate", torch.ones(1, 33).half()).any()


# The whole engine


def test_six_requests_get_the_tokens_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache that is too small for them, so that some are preempted; two have a beginning in common; one is
    steered, and traced."""
    write_tiny_mixtral(tmp_path, seed=5)
    outcomes = []
    for ours in (True, False):
        if ours:
            monkeypatch.setattr(startup, "make_backend", lambda _, config, **options: cuda(config, **options))
        else:
            monkeypatch.undo()
        core = make_core(tmp_path, backend="reference", num_blocks=22, record_routing=True, max_num_batched_tokens=16)
        assert core.info.backend == ("cuda" if ours else "reference")
        # One that is done first, so that its blocks can be found.
        first = run(core, greedy("first", prompt(0, 13), 3))
        outcomes.append((core, first | run(core, *requests())))
    (core, events), (oracle, expected) = outcomes
    assert events.keys() == expected.keys()
    assert len(events) == 7
    for name in expected:
        tokens, wanted = ([token for event in found[name] for token in event.token_ids] for found in (events, expected))
        assert tokens == wanted, name
    check_outcome(core, oracle)
    ours_traced, theirs_traced = traces(events["steered"]), traces(expected["steered"])
    assert [entry.expert_ids for entry in ours_traced] == [entry.expert_ids for entry in theirs_traced]
    assert {len(experts) for entry in ours_traced for experts in entry.expert_ids} == {3}
    assert events["steered"][-1].expert_visits == expected["steered"][-1].expert_visits


def cuda(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, quantization: str | None) -> CudaBackend:
    return CudaBackend(config, H100, device=device, dtype=dtype, weight_dtype=H100.weight_dtype(quantization))


def prompt(seed: int, length: int) -> list[int]:
    return [(7 * i + 11 * seed + 1) % TINY_MIXTRAL.vocab_size for i in range(length)]


def requests() -> list[Request]:
    shared = prompt(0, 13)
    steered = greedy("steered", prompt(4, 6), 12, Steering(experts_per_token=3, forbidden=((0, (1,)),)))
    return [
        greedy("found", [*shared, 5, 9], 12),
        greedy("also found", [*shared[:9], 8], 14),
        greedy("long", prompt(1, 21), 12),
        greedy("short", prompt(2, 1), 20),
        greedy("middle", prompt(3, 10), 16),
        replace(steered, trace_routing=True, trace_prompt_routing=True),
    ]


def check_outcome(core: EngineCore, oracle: EngineCore) -> None:
    """The same steps were made, and routed alike."""
    assert core.stats().num_preemptions == oracle.stats().num_preemptions > 0
    assert core.stats().prefix_cache_hits == oracle.stats().prefix_cache_hits > 0
    assert core.stats().recomputed_tokens == oracle.stats().recomputed_tokens > 0
    ours, theirs = core.routing_record().total(), oracle.routing_record().total()
    assert torch.equal(ours.assigned, theirs.assigned)
    assert torch.equal(ours.hits, theirs.hits)
    mine, exact = stats(ours), stats(theirs)
    assert (mine.tokens, mine.steps) == (exact.tokens, exact.steps)
    assert mine.pooled_auxiliary_loss == pytest.approx(exact.pooled_auxiliary_loss, rel=1e-5)
    for layer, other in zip(mine.layers, exact.layers, strict=True):
        assert (layer.assigned, layer.dispatched) == (other.assigned, other.dispatched)
        assert layer.entropy == pytest.approx(other.entropy, rel=1e-5)
        assert layer.distinct_experts == other.distinct_experts
        assert layer.max_over_mean > 1, "the router is noisy"


def test_cards() -> None:
    assert why_not(TINY_MIXTRAL, H100) is None
    assert "8.0 and newer, this card has 7.5" in str(why_not(TINY_MIXTRAL, Card((7, 5), 68)))
    assert "no halves" in str(why_not(replace(TINY_MIXTRAL, head_dim=7), H100))
    assert "more than the 256" in str(why_not(replace(TINY_MIXTRAL, head_dim=258), H100))
    assert H100.weight_dtype(None) is None
    assert H100.weight_dtype("int8") is torch.int8
    assert H100.weight_dtype("fp8") is Card((8, 9), 128).weight_dtype("fp8") is torch.float8_e4m3fn
    a100 = Card((8, 0), 108)
    assert a100.weight_dtype("fp8") is torch.int8
    assert list(H100.next_best(torch.bfloat16, "fp8")) == []
    fp8, grouped = a100.next_best(torch.bfloat16, "fp8")
    assert "fp8" in fp8
    assert "grouped" in grouped
