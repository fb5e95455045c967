"""Large tensors in host memory."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor


def host_zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, of memory that the system hands out zeroed when it is first written to, where torch would
    write all of it at once; in huge pages where the system has them, so that reading here and there does not wait for
    address translation.
    """
    num_bytes = math.prod(size) * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(size)
