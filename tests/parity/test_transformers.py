"""Logits equal transformers' MixtralForCausalLM: in one go, in chunks, and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.batch import build
from engine.config import EngineConfig
from engine.executor import LocalExecutor
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.startup import start
from engine.types import Request, SamplingParams
from tests.parity.configs import VARIANTS, make

PROMPT_LEN = 29


def paged_logits(folder: Path, ids: list[int], chunks: list[int], *, backend: str) -> Tensor:
    """Logits [len(ids), V] of `ids` computed chunk by chunk through the paged cache, over a scrambled block table."""
    executor, info = start(
        EngineConfig(model=str(folder), backend=backend, device="cpu", block_size=4, kv_cache_memory_bytes=1 << 22)
    )
    assert isinstance(executor, LocalExecutor)
    runner = executor.runner
    sequence = Sequence(Request(request_id="a", prompt_ids=tuple(ids), params=SamplingParams()), arrival=0, seed=0)
    sequence.block_table = list(range(info.num_blocks - 1, info.num_blocks - 1 - 2 * 8, -2))
    rows = []
    with torch.inference_mode():
        for size in chunks:
            plan = StepPlan((Chunk(sequence, sequence.num_computed, size),))
            batch = build(plan, block_size=4, device=torch.device("cpu"))
            rows.append(runner.model.logits(runner.model.forward(batch, runner.cache)))
            sequence.num_computed += size
    return torch.cat(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logits_equal_transformers(variant: str, backend: str, tmp_path: Path) -> None:
    model = make(variant, tmp_path)
    ids = torch.randint(0, 101, (PROMPT_LEN,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    scale = expected.abs().max()
    schedules = {"one go": [29], "chunks": [5, 11, 1, 12], "token by token": [1] * 29}
    for name, chunks in schedules.items():
        if backend == "reference" and name != "chunks":
            continue  # slow, and one schedule shows that it is the oracle
        actual = paged_logits(tmp_path, ids, chunks, backend=backend)
        error = ((actual - expected).abs().max() / scale).item()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
