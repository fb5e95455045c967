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
from engine.memory import available_host_memory, kv_cache_bytes, meter_of, num_kv_blocks, peak_memory_bytes
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


class FakeDevice:
    """A meter of a device of 80 GiB, on which `used` are held, of which a reset gives `spare` back."""

    def __init__(self, used: int, spare: int = 0) -> None:
        self.used = used
        self.spare = spare

    def reset(self) -> None:
        self.used -= self.spare
        self.spare = 0

    def peak(self) -> int:
        raise AssertionError("not asked")

    def allocated(self) -> int:
        return self.used

    def free(self) -> int:
        return 80 * GIB - self.used

    def total(self) -> int:
        return 80 * GIB


def test_what_was_asked_for_is_taken() -> None:
    config = EngineConfig(model="m", kv_cache_memory_bytes=12345)
    for meter in (None, FakeDevice(79 * GIB)):
        assert kv_cache_bytes(config, meter, step_bytes=10**12, graph_bytes=0) == 12345


@pytest.mark.parametrize(
    ("available", "expected"), [(100 * GIB, 4 * GIB), (16 * GIB, 4 * GIB), (16 * GIB - 4, 4 * GIB - 1), (4000, 1000)]
)
def test_on_the_cpu_a_quarter_of_free_memory_up_to_4_gib(
    available: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: available)
    assert kv_cache_bytes(EngineConfig(model="m"), None, step_bytes=1, graph_bytes=1) == expected


def test_on_a_gpu_the_share_less_what_is_used_and_a_step_and_the_graphs() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.75)
    left = kv_cache_bytes(config, FakeDevice(50 * GIB), step_bytes=2 * GIB, graph_bytes=GIB)
    assert left == (60 - 50 - 2 - 1) * GIB
    left = kv_cache_bytes(config, FakeDevice(57 * GIB, spare=7 * GIB), step_bytes=2 * GIB, graph_bytes=GIB)
    assert left == (60 - 50 - 2 - 1) * GIB, "what nobody uses is not used"
    config = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert kv_cache_bytes(config, FakeDevice(50 * GIB), step_bytes=0, graph_bytes=0) == -10 * GIB  # which is refused


def test_a_gpu_is_asked_for_what_its_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    def answer(name: str, value: object) -> None:
        def asked(device: object = None) -> object:
            calls.append((name, device))
            return value

        monkeypatch.setattr(torch.cuda, name, asked)

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        answer(name, None)
    answer("mem_get_info", (30, 80))
    answer("max_memory_reserved", 60)
    answer("memory_reserved", 50)
    meter = meter_of(CUDA)
    assert meter is not None
    meter.reset()
    assert calls == [("synchronize", CUDA), ("empty_cache", None), ("reset_peak_memory_stats", CUDA)]
    assert (meter.peak(), meter.allocated(), meter.free(), meter.total()) == (60, 50, 30, 80)
    assert ("max_memory_reserved", CUDA) in calls
    assert calls.count(("synchronize", CUDA)) == 4, "what is under way has not taken its memory yet"
    assert meter_of(CPU) is None


def test_a_context_or_a_narrower_cache_that_would_fit_is_named() -> None:
    sizes = {"bytes_per_token": 100, "block_size": 16, "max_model_len": 64}
    with pytest.raises(ConfigurationError, match=r"lower --max-model-len to 48 or give it more memory"):
        num_kv_blocks(100 * 63, **sizes)
    with pytest.raises(ConfigurationError, match=r"lower --max-model-len to 32, take --kv-cache-dtype fp8 or give"):
        num_kv_blocks(100 * 32, **sizes, fp8_bytes_per_token=50)
    with pytest.raises(ConfigurationError, match=r"lower --max-model-len to 16 or give it more memory"):
        num_kv_blocks(100 * 32 - 1, **sizes, fp8_bytes_per_token=50)


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
    runner = SimpleNamespace(forward=step, is_out_of_memory=Runner.is_out_of_memory)
    return LocalExecutor(runner)  # type: ignore[arg-type]


PLAN = StepPlan((Chunk(make_sequence([1]), 0, 1),))


def test_memory_that_really_ran_out_fails_the_step_only() -> None:
    with pytest.raises(OutOfDeviceMemoryError):
        execute_with(lambda _: torch.empty(1 << 55, dtype=torch.uint8)).forward(PLAN)
    with pytest.raises(OutOfDeviceMemoryError):
        execute_with(lambda _: bytearray(1 << 55)).forward(PLAN)


def test_what_a_gpu_says_when_memory_ran_out_fails_the_step_only() -> None:
    def run(_: StepPlan) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee the documentation")

    with pytest.raises(OutOfDeviceMemoryError) as raised:
        execute_with(run).forward(PLAN)
    assert str(raised.value) == "CUDA out of memory. Tried to allocate 2 GiB"


def test_other_errors_are_not_taken_for_it() -> None:
    def run(_: StepPlan) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        execute_with(run).forward(PLAN)
