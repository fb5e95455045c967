"""Part "smoke": the backends compute what the reference computes, in one forward pass and through the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine import batch as batches
from engine.backends.select import make_backend
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.models.registry import build_model
from engine.routing.select import make_router
from engine.routing.steering import SteeringTable
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence as EngineSequence
from engine.startup import DTYPES
from engine.types import Request, SamplingParams, TokenEvent
from tests.bench.card.models import TINY, TINY_CACHE_BYTES
from tests.bench.card.report import Part, Setting
from tests.tiny import write_tiny_mixtral
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.loader import load

PROMPT_LENGTHS = (1, 5, 17, 33)
CLOSE_CALL = 1e-3
"""Greedy tokens may differ from the step on whose two best logits are closer than this."""


def smoke(setting: Setting, part: Part) -> None:
    backends = ("torch", "cuda") if setting.device.type == "cuda" else ("torch",)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_mixtral(folder, TINY)
        exact = logits_of(folder, "reference", "float32", setting.device)
        errors = {}
        for backend, dtype in (
            ("reference", "bfloat16"),
            *((backend, dtype) for backend in backends for dtype in ("float32", "bfloat16")),
        ):
            error = relative_error(logits_of(folder, backend, dtype, setting.device), exact)
            errors[f"{backend} {dtype}"] = error
            part.row("logits", backend=backend, dtype=dtype, error=error)
        for backend in backends:
            assert errors[f"{backend} float32"] < 1e-4, errors
            assert errors[f"{backend} bfloat16"] < max(0.03, 2 * errors["reference bfloat16"]), errors
            same, num_tokens = compare_greedy(folder, backend, setting)
            part.row("greedy", backend=backend, equal=same, tokens=num_tokens)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    return float((actual - expected).norm() / expected.norm())


@torch.inference_mode()
def logits_of(folder: Path, backend_name: str, dtype: str, device: torch.device) -> Tensor:
    """Logits [T, V] float32 of prompts of `PROMPT_LENGTHS`: a batch of all but their last tokens, then one of those."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    backend = make_backend(backend_name, config, device=device, dtype=DTYPES[dtype])
    load(checkpoint, backend)
    router = make_router(config, router=None, capacity_factor=None, simulation=None)
    model = build_model(config, backend, router)
    steering = SteeringTable.for_model(config, num_slots=1, device=device)
    block_size, num_blocks = 16, 8
    cache = backend.new_kv_cache(config.num_layers, num_blocks, block_size, model.attention_shape)
    sequences = [EngineSequence(request, arrival=i, seed=0) for i, request in enumerate(requests(config, 1))]
    free = iter(range(num_blocks))
    for sequence in sequences:
        sequence.block_table = [next(free) for _ in range(-(-sequence.num_tokens // block_size))]
    prompts = StepPlan(tuple(Chunk(s, 0, s.num_tokens - 1) for s in sequences if s.num_tokens > 1))
    last = StepPlan(tuple(Chunk(s, s.num_tokens - 1, 1) for s in sequences))
    logits = []
    for plan in (prompts, last):
        batch = batches.build(plan, block_size=block_size, steering=steering, device=device)
        with waits_are_errors(device, backend_name):
            logits.append(model.logits(model.forward(batch, cache)))
    return torch.cat(logits)


@contextmanager
def waits_are_errors(device: torch.device, backend: str) -> Iterator[None]:
    """Nothing in a step of backend cuda waits for the device: torch sees to it."""
    if device.type != "cuda" or backend != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def requests(config: ModelConfig, max_tokens: int) -> list[Request]:
    """One greedy request a prompt length, of ids that differ."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)
    return [
        Request(
            request_id=str(length),
            prompt_ids=tuple((7 * i + 13 * length) % config.vocab_size for i in range(length)),
            params=params,
        )
        for length in PROMPT_LENGTHS
    ]


def compare_greedy(folder: Path, backend: str, setting: Setting) -> tuple[int, int]:
    """(greedy tokens that agree before the first close call, tokens generated). Raises where others differ."""
    outputs = []
    for name in ("reference", backend):
        core = EngineCore.build(
            EngineConfig(
                model=str(folder), device=setting.device.type, backend=name, kv_cache_memory_bytes=TINY_CACHE_BYTES
            )
        )
        outputs.append(drain(core, requests(TINY, 12)))
    same = total = 0
    for request_id, expected in outputs[0].items():
        actual = outputs[1][request_id]
        assert len(actual) == len(expected) == 12
        total += 12
        for ours, theirs in zip(actual, expected, strict=True):
            if gap(theirs) < CLOSE_CALL:
                break
            assert ours.token_ids == theirs.token_ids, f"request {request_id}: {ours} instead of {theirs}"
            same += 1
    return same, total


def gap(event: TokenEvent) -> float:
    assert event.logprobs is not None
    (_, best), (_, second) = event.logprobs[0].top
    return best - second


def drain(core: EngineCore, work: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    """Run requests to their ends: their events by request id."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            events[event.request_id].append(event)
    return events
