"""What a captured graph would read and write stays where it is, whatever requests come and go."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.executor import LocalExecutor
from engine.startup import start
from engine.types import Request, SamplingParams, Steering
from tests.tiny import write_tiny_mixtral


def addresses(*owners: object) -> dict[str, int]:
    """Where the tensors that `owners` hold lie, those of their dataclasses too."""
    found: dict[str, int] = {}
    for owner in owners:
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                found[name] = value.data_ptr()
            elif hasattr(value, "tensors"):
                found |= {f"{name}.{i}": tensor.data_ptr() for i, tensor in enumerate(value.tensors())}
    return found


def engine(folder: Path, *, record_routing: bool) -> tuple[EngineCore, LocalExecutor]:
    write_tiny_mixtral(folder)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_num_seqs=4,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 20,
        record_routing=record_routing,
    )
    executor, info = start(config)
    assert isinstance(executor, LocalExecutor)
    return EngineCore(executor, info), executor


def work(core: EngineCore, name: str) -> None:
    """Six requests, each steered in a way of its own, so that slots are given up and filled again."""
    for index in range(6):
        steering = Steering(experts_per_token=1 + index % 4, min_p=index / 100, forbidden=((index % 2, (0,)),))
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        ids = tuple(range(index, index + 5))
        core.add(Request(request_id=f"{name}{index}", prompt_ids=ids, params=params, steering=steering))
    while core.has_work:
        core.step()


def test_record_and_steering_stay_in_place(tmp_path: Path) -> None:
    core, executor = engine(tmp_path, record_routing=True)
    record = executor.runner.record
    assert record is not None
    before = addresses(record, executor.runner.steering)
    assert len(before) > 15
    work(core, "a")
    core.reset_experts()
    work(core, "b")
    assert addresses(record, executor.runner.steering) == before
    assert core.expert_report().total.tokens == 6 * 7  # five prompt tokens and two of the three new ones each


def test_nothing_is_kept_or_called_when_off(tmp_path: Path) -> None:
    core, executor = engine(tmp_path, record_routing=False)
    assert executor.routing_record() is None
    work(core, "a")
    assert executor.runner.record is None
    assert not core.info.record_routing
