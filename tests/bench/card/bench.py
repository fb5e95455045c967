"""Bench: the device, the model and the measures that the parts about kernels share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.backends.base import AttentionShape
from engine.backends.cuda.card import Card
from tests.bench.card.clock import Clock, copy_tb_per_s, matmul_tflops
from tests.bench.card.models import MIXTRAL_8X7B, TINY
from tests.bench.card.report import Part, Setting
from weights.config import ModelConfig

H100 = Card((9, 0), 132)
"""What the interpreter pretends to be."""


@dataclass(frozen=True, slots=True)
class Bench:
    part: Part
    device: torch.device
    tiny: bool
    card: Card
    model: ModelConfig
    dtype: torch.dtype
    """Of activations: bfloat16, whose arithmetic the interpreter does not have right, so that it gets float32."""
    clock: Clock
    copy_tb_per_s: float
    matmul_tflops: float
    wrong: list[str] = field(default_factory=list)
    """What differed from the reference."""

    @classmethod
    def make(cls, setting: Setting, part: Part) -> Bench:
        """Measures a copy and a product first, in whose shares all times are told."""
        device, clock = setting.device, Clock(setting.device)
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        copied, product = copy_tb_per_s(clock, device), matmul_tflops(clock, device, dtype)
        part.set(copy_tb_per_s=copied, matmul_tflops=product)
        card, model = Card.of(device) if on_gpu else H100, TINY if setting.tiny else MIXTRAL_8X7B
        return cls(part, device, setting.tiny, card, model, dtype, clock, copied, product)

    @property
    def shape(self) -> AttentionShape:
        model = self.model
        return AttentionShape(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            sliding_window=model.sliding_window,
        )

    def is_due(self, table: str, keys: Mapping[str, Any]) -> bool:
        """Whether a row has to be measured: it is not there yet, and there is time."""
        name = " ".join([table, *map(str, keys.values())])
        return not self.part.rows(table, **keys) and self.part.has_time(name)

    def check(self, name: str, error: float, tolerance: float) -> None:
        """Remember what is wrong: the part fails at its end, with all its rows written."""
        if not error <= tolerance:
            self.wrong.append(f"{name}: error {error:.2e}, more than {tolerance:.0e}")

    def time(
        self,
        table: str,
        keys: Mapping[str, Any],
        run: Callable[[], object],
        *,
        num_bytes: int | None = None,
        operations: int | None = None,
        **values: Any,
    ) -> None:
        """A row of times: microseconds, and what they mean for the bytes moved and the operations done."""
        microseconds = self.clock.microseconds(run)
        rates: dict[str, float] = {"us": microseconds}
        if num_bytes is not None:
            rates["tb_per_s"] = num_bytes / microseconds / 1e6
            rates["percent_of_copy"] = 100 * rates["tb_per_s"] / self.copy_tb_per_s
        if operations is not None:
            rates["tflops"] = operations / microseconds / 1e6
            rates["percent_of_matmul"] = 100 * rates["tflops"] / self.matmul_tflops
        self.part.row(table, **keys, **rates, **values)
