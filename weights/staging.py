"""Where tensors are on their way from a file to a sink: one piece of memory, used round and round."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

_ALIGNMENT = 64


class CopyEvent(Protocol):
    """Fires when the copies that were under way at its recording are done. torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether it has fired."""

    def synchronize(self) -> None:
        """Waits until it has."""


class Staging(Protocol):
    """Makes the memory that tensors are read into, and tells when a sink has taken a tensor out of it."""

    ahead_bytes: int
    """How far reading may be ahead at least, where the files are as large."""

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the CPU."""

    def record(self) -> CopyEvent | None:
        """Called when a sink has returned from a tensor. None: it has copied what it keeps, and the memory is free."""


class HostStaging:
    """For sinks on the CPU, which are done with a tensor when they return."""

    # Enough to keep the readers busy while a tensor is packed; more would be more memory to touch for the first time.
    ahead_bytes = 128 << 20

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def record(self) -> None:
        return None


class PinnedStaging:
    """For sinks on a CUDA device: pinned memory, which its copies read from after the sink has returned."""

    ahead_bytes = 512 << 20  # four matrices of an expert of 8x7B

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def record(self) -> CopyEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Ring:
    """Stretches of one memory, taken and released in the same order.

    A stretch is contiguous: what does not fit before the end starts at the beginning again. Example, 256 bytes: a takes
    [0, 128), b takes [128, 192); c of 100 does not fit behind b, and has to wait until a is released to take [0, 100).
    """

    def __init__(self, staging: Staging, num_bytes: int) -> None:
        self._size = max(1, -(-num_bytes // _ALIGNMENT)) * _ALIGNMENT  # tensors may all be empty
        self._staging = staging
        self._memory = staging.allocate(self._size)
        # Places count on and on; place p is byte p % size. What lies in [first, next) may not be written to.
        self._first = 0
        self._next = 0
        self._in_use: deque[int] = deque()  # where each stretch ends
        self._leaving: deque[tuple[int, CopyEvent | None]] = deque()  # the same, of those released

    def take(self, num_bytes: int) -> Tensor | None:
        """uint8 [num_bytes] at a multiple of 64 bytes, or None while there is no room. `num_bytes` <= the ring's."""
        self._collect()
        if not self._in_use and not self._leaving:
            self._first = self._next = 0
        start = -(-self._next // _ALIGNMENT) * _ALIGNMENT
        if start % self._size + num_bytes > self._size:
            start = (start // self._size + 1) * self._size
        if start + num_bytes - self._first > self._size:
            return None
        self._next = start + num_bytes
        self._in_use.append(self._next)
        return self._memory[start % self._size :][:num_bytes]

    def release(self) -> None:
        """Gives back the oldest stretch that was taken, from when the copies that are under way are done."""
        self._leaving.append((self._in_use.popleft(), self._staging.record()))

    def wait(self) -> None:
        """Waits until the oldest stretch that was released may be written to."""
        _, event = self._leaving[0]
        if event is not None:
            event.synchronize()
        self._collect()

    def drain(self) -> None:
        """Waits for everything released."""
        while self._leaving:
            self.wait()

    def _collect(self) -> None:
        while self._leaving and ((event := self._leaving[0][1]) is None or event.query()):
            self._first, _ = self._leaving.popleft()


def staging_for(device: torch.device) -> Staging:
    """How to read tensors that go to `device`."""
    return PinnedStaging(device) if device.type == "cuda" else HostStaging()
