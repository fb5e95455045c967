"""The steps that measure activations run, at their full sizes, on a device that only counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.executor import LocalExecutor
from engine.profile import StepMemory, measure_steps
from engine.runner import Runner, Step
from engine.scheduler import StepPlan
from engine.startup import start
from tests.tiny import write_tiny_mixtral


class CountingDevice:
    """A device on which a step takes 1,000 bytes a token while it runs, and 7 for each token ever computed stay."""

    def __init__(self) -> None:
        self.held = 5000
        self.most = 0
        self.resets = 0

    def compute(self, num_tokens: int) -> None:
        self.most = max(self.most, self.held + 1000 * num_tokens)
        self.held += 7 * num_tokens

    def reset(self) -> None:
        self.resets += 1
        self.most = self.held

    def peak(self) -> int:
        return self.most

    def allocated(self) -> int:
        return self.held

    def free(self) -> int:
        raise AssertionError("not asked")

    def total(self) -> int:
        raise AssertionError("not asked")


@pytest.mark.parametrize(("budget", "max_num_seqs", "max_model_len"), [(37, 5, 29), (8, 64, 50), (50, 1, 50)])
def test_the_largest_steps_run_and_are_measured(
    budget: int, max_num_seqs: int, max_model_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    runner, device = executor.runner, CountingDevice()
    assert runner.record is not None
    steps: list[list[tuple[int, int]]] = []
    widest: list[int] = []
    forward = Runner.forward

    def counted(runner: Runner, plan: StepPlan) -> Step:
        steps.append([(chunk.start, chunk.num_tokens) for chunk in plan.chunks])
        device.compute(plan.num_tokens)
        step = forward(runner, plan)
        assert step._tensors is not None
        widest.append(step._tensors.routing.max_top_k)
        return step

    monkeypatch.setattr(Runner, "forward", counted)
    cache = runner.model.backend.new_kv_cache(model_config.num_layers, 1, 16, runner.model.attention_shape)
    measured = measure_steps(
        runner.model,
        cache,
        config,
        model_config,
        runner.record,
        device,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        max_choices=4,
    )
    num_seqs, longest = min(max_num_seqs, budget), min(budget, max_model_len)
    first, many, long, decodes = steps
    assert first == [(0, 1)]
    assert len(many) == num_seqs
    assert sum(length for _, length in many) == min(budget, num_seqs * max_model_len)
    assert long == [(max_model_len - longest, longest)]
    assert decodes == [(max_model_len - 1, 1)] * num_seqs
    assert widest == [4, 4, 4, 4], "a request may ask for so many"
    assert measured == StepMemory(step=1000 * min(budget, num_seqs * max_model_len), decode=1000 * num_seqs)
    assert device.resets == 3
    assert int(runner.record.total().tokens) == 0, "measuring is no traffic"


def test_no_more_decodes_are_measured_than_a_graph_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their contexts are bounded, since the host would take long to make them."""
    model_config = write_tiny_mixtral(tmp_path, max_position_embeddings=10_000)
    config = EngineConfig(
        model=str(tmp_path), device="cpu", max_num_batched_tokens=600, max_num_seqs=600, kv_cache_memory_bytes=1 << 24
    )
    executor, _ = start(config)
    assert isinstance(executor, LocalExecutor)
    model = executor.runner.model
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(Runner, "run", lambda *_: None)
    monkeypatch.setattr(Runner, "forward", lambda _, plan: sizes.append((len(plan.chunks), plan.chunks[0].start)))
    cache = model.backend.new_kv_cache(model_config.num_layers, 1, 16, model.attention_shape)
    assert cache.keys.dtype == torch.float32
    measure_steps(
        model,
        cache,
        config,
        model_config,
        None,
        CountingDevice(),
        max_num_batched_tokens=600,
        max_model_len=10_000,
        max_choices=4,
    )
    assert sizes == [(512, 4095)]
