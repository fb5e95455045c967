"""The steps that measure activations run, at their full sizes. What they measure only a GPU can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.executor import LocalExecutor
from engine.profile import measure_activations
from engine.startup import start
from tests.tiny import write_tiny_mixtral


@pytest.mark.parametrize(("budget", "max_num_seqs", "max_model_len"), [(37, 5, 29), (8, 64, 50), (50, 1, 50)])
def test_the_largest_steps_run(
    budget: int, max_num_seqs: int, max_model_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 350)
    model_config = write_tiny_mixtral(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=1 << 22,
        record_routing=True,
    )
    executor, _ = start(config)
    assert isinstance(executor, LocalExecutor)
    record = executor.runner.record
    assert record is not None
    peak = measure_activations(
        executor.runner.model,
        config,
        model_config,
        record,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
    )
    assert peak == 250
    assert int(record.total().tokens) == 0, "measuring is no traffic"
