"""Clock: how long something takes on a device; and what a copy and a product take on it, to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_LEAST, _MOST = 5, 50
_SECONDS = 0.2


class Clock:
    """Times what it is given alone, from a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        # Twenty times the L2 cache. While it is written to, the host prepares what is timed.
        self._eraser = torch.empty(1 << 30 if on_gpu else 1, dtype=torch.uint8, device=device)

    def microseconds(self, run: Callable[[], object]) -> float:
        """Median of a few runs, after one that may compile."""
        run()
        if self._device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start)
        first = self._on_gpu(run, _LEAST)
        return statistics.median(self._on_gpu(run, min(_MOST, max(_LEAST, int(_SECONDS * 1e6 / min(first))))))

    def _on_gpu(self, run: Callable[[], object], times: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]  # type: ignore[no-untyped-call]
        for start, end in events:
            self._eraser.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self._device)
        return [1e3 * start.elapsed_time(end) for start, end in events]


def copy_tb_per_s(clock: Clock, device: torch.device) -> float:
    """Bytes read and written, of a copy of 2 GiB."""
    source = torch.ones(1 << 31 if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.microseconds(lambda: target.copy_(source)) / 1e6


def matmul_tflops(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Of a square product of 8192."""
    size = 8192 if device.type == "cuda" else 64
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / clock.microseconds(lambda: a @ a) / 1e6
