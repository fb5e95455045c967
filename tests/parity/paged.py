"""Prompts through the paged engine, chunk by chunk, down to their logits."""

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
from engine.types import Request, SamplingParams, Steering


def load_runner(folder: str, *, backend: str = "torch", dtype: str = "float32", max_model_len: int = 256) -> Runner:
    """A runner on the CPU with at least twice the blocks of one sequence."""
    executor, _ = start(
        EngineConfig(
            model=folder,
            backend=backend,
            device="cpu",
            dtype=dtype,
            block_size=4,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=1 << 25,
        )
    )
    assert isinstance(executor, LocalExecutor)
    return executor.runner


def paged_logits(runner: Runner, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits [len(ids), V] of `ids`, computed in `chunks`, over blocks that are scattered and in falling order."""
    return paged_batch(runner, [ids], [None], [chunks])[0]


def paged_batch(
    runner: Runner, prompts: list[list[int]], steerings: list[Steering | None], chunks: list[list[int]]
) -> list[Tensor]:
    """Logits [len(ids), V] of each of several prompts. Step n computes the n-th chunk of all that have one."""
    sequences, last = [], runner.cache.num_blocks - 1
    for ids, steering in zip(prompts, steerings, strict=True):
        request = Request(request_id="a", prompt_ids=tuple(ids), params=SamplingParams(), steering=steering)
        sequence = Sequence(request, arrival=0, seed=0)
        sequence.block_table = [last - 2 * block for block in range(-(-len(ids) // runner.cache.block_size))]
        last = sequence.block_table[-1] - 2
        sequences.append(sequence)
    assert sequences[-1].block_table[-1] >= 0
    rows: list[list[Tensor]] = [[] for _ in prompts]
    with torch.inference_mode():
        for step in range(max(map(len, chunks))):
            plan = StepPlan(
                tuple(
                    Chunk(sequence, sequence.num_computed, sizes[step])
                    for sequence, sizes in zip(sequences, chunks, strict=True)
                    if step < len(sizes)
                )
            )
            batch = build(
                plan,
                block_size=runner.cache.block_size,
                steering=runner.steering,
                device=torch.device("cpu"),
            )
            logits = runner.model.logits(runner.model.forward(batch, runner.cache))
            for chunk, part in zip(plan.chunks, torch.split(logits, batch.query_lens), strict=True):
                rows[sequences.index(chunk.sequence)].append(part)
                chunk.sequence.num_computed += chunk.num_tokens
    return [torch.cat(parts) for parts in rows]
