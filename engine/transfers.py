"""Between host and device without waiting: what a step needs goes down, what it found comes up later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

HostValues: TypeAlias = Sequence[int] | Sequence[float] | np.ndarray[Any, Any] | Tensor


def to_device(values: HostValues, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values on `device`. A GPU copies it out of pinned memory while the host goes on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Copy a host tensor into one on a device, as `to_device` does."""
    target.copy_(source if target.device.type == "cpu" else source.pin_memory(), non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in (pinned) host memory, where it is when an `Arrival` made after it is; on the CPU, itself."""
    return tensor.to("cpu", non_blocking=True)


class Arrival:
    """The moment when everything that was asked of a device until now is done."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
