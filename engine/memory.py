"""How the memory of a device is measured and shared out, once the weights are in place."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.machine import default_host_cache, host_memory


class MemoryMeter(Protocol):
    """Measures the memory of one device, in bytes. What is held counts in whole pieces, as it was taken of it."""

    def reset(self) -> None:
        """Give back what is held for no tensor, and begin a new peak."""
        ...

    def peak(self) -> int:
        """The most that this process held for tensors since `reset`."""
        ...

    def allocated(self) -> int:
        """What this process holds for tensors."""
        ...

    def free(self) -> int:
        """What nobody holds."""
        ...

    def total(self) -> int:
        """The size of the device's memory."""
        ...


class CudaMeter:
    """A `MemoryMeter` of a GPU, by torch's allocator. Every question waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def allocated(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_reserved(self._device)

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]


def meter_of(device: torch.device) -> MemoryMeter | None:
    """None: the CPU's memory is other programs' too, and its allocator does not tell."""
    return CudaMeter(device) if device.type == "cuda" else None


def kv_cache_bytes(config: EngineConfig, meter: MemoryMeter | None, *, step_bytes: int, graph_bytes: int) -> int:
    """Bytes for the KV cache: what was asked for, or what the device has left.

    With a `meter`, of a GPU: `gpu_memory_utilization` of its memory less what is held of it now, by whomever, and what
    the largest step and the graphs will take. Without, on the CPU, whose memory other programs share: the smaller of
    4 GiB and a quarter of what is available.

    Example, 80 GB at 0.9: 72, of which 50 are held, and 2 and 1 will be: 19.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if meter is None:
        return default_host_cache(available_host_memory())
    meter.reset()
    held = meter.total() - meter.free()
    return int(meter.total() * config.gpu_memory_utilization) - held - step_bytes - graph_bytes


def num_kv_blocks(
    num_bytes: int,
    *,
    bytes_per_token: int,
    block_size: int,
    max_model_len: int,
    fp8_bytes_per_token: int | None = None,
) -> int:
    """Whole blocks that `num_bytes` hold. Raises ConfigurationError when one sequence of `max_model_len` would not fit.

    `fp8_bytes_per_token`: where the cache could be narrower than it is, what a token would take then.

    Example: 1 MiB at 1,000 bytes a token in blocks of 16 is 65 blocks (65.5 of 16,000 bytes).
    """
    num_blocks = max(0, num_bytes) // (bytes_per_token * block_size)
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        shorter = f" to {num_blocks * block_size}" if num_blocks else ""
        narrower = ""
        if fp8_bytes_per_token is not None and needed * block_size * fp8_bytes_per_token <= num_bytes:
            narrower = ", take --kv-cache-dtype fp8"
        raise ConfigurationError(
            f"the KV cache of {max(0, num_bytes):,} bytes holds {num_blocks * block_size} tokens, but one sequence of "
            f"{max_model_len} tokens needs {needed * block_size * bytes_per_token:,} bytes: lower "
            f"--max-model-len{shorter}{narrower} or give it more memory (--kv-cache-memory-bytes, or on a GPU "
            f"--gpu-memory-utilization)"
        )
    return num_blocks


def available_host_memory() -> int:
    """Bytes of host memory that can be had without swapping, within what the control group allows in all."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
        return min(available, host_memory())
    except (OSError, StopIteration):
        return host_memory() // 2


def peak_memory_bytes(device: torch.device) -> int:
    """Highest device memory allocated on a GPU, highest resident memory of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
