"""Memory: how many blocks a number of bytes makes, and what is left for them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import memory
from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.executor import LocalExecutor, OutOfDeviceMemoryError
from engine.memory import available_host_memory, kv_cache_bytes, num_kv_blocks, peak_memory_bytes
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from tests.engine.sequences import make_sequence

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


def test_the_example() -> None:
    assert num_kv_blocks(1 << 20, bytes_per_token=1000, block_size=16, max_model_len=1040) == 65


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**7), st.integers(1, 5000), st.integers(1, 64), st.integers(1, 300))
def test_as_many_whole_blocks_as_fit(num_bytes: int, bytes_per_token: int, block_size: int, max_model_len: int) -> None:
    block_bytes = bytes_per_token * block_size
    fits = len(range(0, max_model_len, block_size)) * block_bytes <= num_bytes

    def count() -> int:
        return num_kv_blocks(
            num_bytes, bytes_per_token=bytes_per_token, block_size=block_size, max_model_len=max_model_len
        )

    if fits:
        assert count() * block_bytes <= num_bytes < (count() + 1) * block_bytes
        assert count() * block_size >= max_model_len
    else:
        with pytest.raises(ConfigurationError):
            count()


@pytest.mark.parametrize("num_bytes", [-(5 * GIB), 0, 1, 100 * 4 * 16 - 1])
def test_too_little_for_one_sequence(num_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match=r"one sequence of 61 tokens needs .*--max-model-len"):
        num_kv_blocks(num_bytes, bytes_per_token=100, block_size=16, max_model_len=61)
    assert num_kv_blocks(100 * 4 * 16, bytes_per_token=100, block_size=16, max_model_len=61) == 4


@pytest.mark.parametrize(
    ("bytes_per_token", "max_model_len"), [(131_072, 32768), (131_073, 4100), (1_000, 777), (23_040, 8192), (64, 40)]
)
def test_the_amount_that_the_message_names_is_enough(bytes_per_token: int, max_model_len: int) -> None:
    sizes = {"bytes_per_token": bytes_per_token, "block_size": 16, "max_model_len": max_model_len}
    with pytest.raises(ConfigurationError) as raised:
        num_kv_blocks(0, **sizes)
    found = re.search(r"needs ([\d,.]+) (\w+)", str(raised.value))
    assert found is not None
    named = float(found[1].replace(",", "")) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}[found[2]]
    assert num_kv_blocks(int(named), **sizes) * 16 >= max_model_len
    assert named < 1.01 * (max_model_len + 16) * bytes_per_token + (1 << 20)


def test_what_was_asked_for_is_taken() -> None:
    config = EngineConfig(model="m", kv_cache_memory_bytes=12345)
    for device in (CPU, CUDA):
        assert kv_cache_bytes(config, device, activation_bytes=10**12) == 12345


@pytest.mark.parametrize(
    ("available", "expected"), [(100 * GIB, 4 * GIB), (16 * GIB, 4 * GIB), (16 * GIB - 4, 4 * GIB - 1), (4000, 1000)]
)
def test_on_the_cpu_a_quarter_of_free_memory_up_to_4_gib(
    available: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: available)
    assert kv_cache_bytes(EngineConfig(model="m"), CPU, activation_bytes=1) == expected


def test_on_a_gpu_the_share_less_what_is_used_and_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 80 * GIB))
    config = EngineConfig(model="m", gpu_memory_utilization=0.75)
    assert kv_cache_bytes(config, CUDA, activation_bytes=2 * GIB) == (60 - 50 - 2) * GIB
    config = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert kv_cache_bytes(config, CUDA, activation_bytes=0) == -10 * GIB  # which num_kv_blocks refuses


def test_free_host_memory() -> None:
    available = available_host_memory()
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_free_host_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert available_host_memory() == pytest.approx(total / 2, rel=0.01)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemTotal: 12 kB\n")
    assert available_host_memory() == pytest.approx(total / 2, rel=0.01)


def test_peak_memory_is_what_the_kernel_says() -> None:
    peak = peak_memory_bytes(CPU)
    assert peak >= 0.95 * psutil.Process().memory_info().rss
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        assert peak == pytest.approx(int(lines["VmHWM"].split()[0]) * 1024, rel=0.05)


def execute_with(step: object) -> LocalExecutor:
    """An executor whose runner does nothing but `step`."""
    runner = SimpleNamespace(run=step, is_out_of_memory=Runner.is_out_of_memory)
    return LocalExecutor(runner)  # type: ignore[arg-type]


PLAN = StepPlan((Chunk(make_sequence([1]), 0, 1),))


def test_memory_that_really_ran_out_fails_the_step_only() -> None:
    with pytest.raises(OutOfDeviceMemoryError):
        execute_with(lambda _: torch.empty(1 << 55, dtype=torch.uint8)).execute(PLAN)
    with pytest.raises(OutOfDeviceMemoryError):
        execute_with(lambda _: bytearray(1 << 55)).execute(PLAN)


def test_what_a_gpu_says_when_memory_ran_out_fails_the_step_only() -> None:
    def run(_: StepPlan) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee the documentation")

    with pytest.raises(OutOfDeviceMemoryError) as raised:
        execute_with(run).execute(PLAN)
    assert str(raised.value) == "CUDA out of memory. Tried to allocate 2 GiB"


def test_other_errors_are_not_taken_for_it() -> None:
    def run(_: StepPlan) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        execute_with(run).execute(PLAN)
