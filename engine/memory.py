"""How much memory the KV cache gets, decided once the weights are in place."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.plan import host_memory

_CPU_CACHE_LIMIT = 4 << 30


def kv_cache_bytes(config: EngineConfig, device: torch.device, *, activation_bytes: int) -> int:
    """Bytes for the KV cache: what was asked for, or what the device has left.

    On a GPU: `gpu_memory_utilization` of its memory less what the process holds and the peak of a step. On the CPU,
    whose memory other programs share: the smaller of 4 GiB and a quarter of what is available.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes
    return min(_CPU_CACHE_LIMIT, available_host_memory() // 4)


def num_kv_blocks(num_bytes: int, *, bytes_per_token: int, block_size: int, max_model_len: int) -> int:
    """Whole blocks that `num_bytes` hold. Raises ConfigurationError when one sequence of `max_model_len` would not fit.

    Example: 1 MiB at 1,000 bytes a token in blocks of 16 is 65 blocks (65.5 of 16,000 bytes).
    """
    num_blocks = max(0, num_bytes) // (bytes_per_token * block_size)
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        raise ConfigurationError(
            f"the KV cache of {max(0, num_bytes):,} bytes holds {num_blocks * block_size} tokens, but one sequence of "
            f"{max_model_len} tokens needs {needed * block_size * bytes_per_token:,} bytes: give it more memory "
            f"(--kv-cache-memory-bytes) or lower --max-model-len"
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
