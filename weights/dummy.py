"""Random weights of the right shapes, for measuring without a checkpoint."""

from __future__ import annotations

import time

import torch

from weights.config import ModelConfig
from weights.families import family_of
from weights.families.mixtral import param_specs
from weights.loader import LoadReport, WeightSink
from weights.params import ParamKind

STANDARD_DEVIATION = 0.02


def load(
    config: ModelConfig, sink: WeightSink, *, device: torch.device | str, dtype: torch.dtype, seed: int
) -> LoadReport:
    """Gives `sink` every piece of the family, drawn on `device` in `dtype`: norms are ones, the rest N(0, 0.02²).

    One piece exists at a time, so that host memory stays small whatever the model's size. The same seed gives the same
    values on the same kind of device.
    """
    start = time.perf_counter()
    kinds = {spec.name: spec.kind for spec in param_specs(config)}
    generator = torch.Generator(device).manual_seed(seed)
    num_bytes = 0
    for piece in family_of(config).pieces(config):
        tensor = torch.ones(piece.shape, device=device, dtype=dtype)
        if kinds[piece.param] is not ParamKind.NORM:
            tensor.normal_(std=STANDARD_DEVIATION, generator=generator)
        sink.prepare(piece, tensor)
        num_bytes += tensor.nbytes
    return LoadReport(num_bytes, time.perf_counter() - start)
