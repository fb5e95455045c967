"""A prompt through the paged engine, chunk by chunk, down to its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import build
from engine.config import EngineConfig
from engine.executor import LocalExecutor
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.startup import start
from engine.types import Request, SamplingParams


def load_runner(folder: str, *, backend: str = "torch", max_model_len: int = 256) -> Runner:
    """A float32 runner on the CPU with at least twice the blocks of one sequence."""
    executor, _ = start(
        EngineConfig(
            model=folder,
            backend=backend,
            device="cpu",
            dtype="float32",
            block_size=4,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=1 << 25,
        )
    )
    assert isinstance(executor, LocalExecutor)
    return executor.runner


def paged_logits(runner: Runner, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits [len(ids), V] of `ids`, computed in `chunks`, over blocks that are scattered and in falling order."""
    sequence = Sequence(Request(request_id="a", prompt_ids=tuple(ids), params=SamplingParams()), arrival=0, seed=0)
    last, num_blocks = runner.cache.num_blocks - 1, -(-len(ids) // runner.cache.block_size)
    sequence.block_table = list(range(last, last - 2 * num_blocks, -2))
    rows = []
    with torch.inference_mode():
        for size in chunks:
            plan = StepPlan((Chunk(sequence, sequence.num_computed, size),))
            batch = build(
                plan,
                block_size=runner.cache.block_size,
                steering=runner.steering,
                device=torch.device("cpu"),
            )
            rows.append(runner.model.logits(runner.model.forward(batch, runner.cache)))
            sequence.num_computed += size
    return torch.cat(rows)
