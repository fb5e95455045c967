"""Card: what a GPU has that a kernel or a path asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

OLDEST = (8, 0)
"""The first compute capability that the kernels are compiled for (A100)."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its compute capability and its number of multiprocessors."""

    capability: tuple[int, int]
    num_sms: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        properties = torch.cuda.get_device_properties(device)
        return cls((properties.major, properties.minor), properties.multi_processor_count)

    @property
    def reads_fp8(self) -> bool:
        return self.capability >= (8, 9)

    def weight_dtype(self, quantization: str | None) -> torch.dtype | None:
        """Of the experts' weights, None: the model's. A card that cannot read e4m3 takes int8, of the same size."""
        if quantization is None:
            return None
        return torch.float8_e4m3fn if quantization == "fp8" and self.reads_fp8 else torch.int8

    def next_best(self, dtype: torch.dtype, quantization: str | None) -> Iterator[str]:
        """What this card does another way than the newest, for the log."""
        if quantization == "fp8" and self.weight_dtype("fp8") is not torch.float8_e4m3fn:
            yield "it reads no fp8 (compute capability 8.9 and newer do): the experts are int8"
        if self.capability < (9, 0) and dtype == torch.bfloat16 and quantization != "int8":  # int8 has none anywhere
            yield "torch has no grouped GEMM for it (compute capability 9.0 and newer): prompts take the decode kernels"
