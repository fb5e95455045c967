"""The backend that serves a model on a device."""

from __future__ import annotations

import logging

import torch

from engine.backends.base import LayerBackend
from engine.backends.cpu import CpuBackend, why_not
from engine.backends.reference import ReferenceBackend
from engine.backends.torch import TorchBackend
from engine.errors import ConfigurationError
from engine.kernels.cpu.library import InstructionSet, WeightType, best
from weights.config import ModelConfig
from weights.families.mixtral import param_specs

log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "torch", "reference")


def make_backend(
    name: str, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> LayerBackend | CpuBackend:
    """The backend called `name`. auto: the CPU's own kernels where they can serve the model, else torch's operations.

    Raises ConfigurationError when it cannot serve the model.
    """
    assert name in BACKENDS
    if name in ("auto", "cpu"):
        found = best()
        reason = _why_not_cpu(found, config, device, dtype)
        if reason is None:
            assert found is not None
            weight_type = WeightType.int8 if quantization == "int8" else _WEIGHT_TYPES[dtype]
            return CpuBackend(config, dtype=dtype, weight_type=weight_type, instruction_set=found)
        if name == "cpu" or quantization is not None:
            wanted = f"backend {name}" if quantization is None else f"quantization {quantization}"
            raise ConfigurationError(f"{wanted} needs the CPU kernels: {reason}")
        if device.type == "cpu":
            log.warning("torch's operations serve this model, several times slower than the CPU kernels: %s", reason)
    elif quantization is not None:
        raise ConfigurationError(f"backend {name} has no {quantization} weights")
    specs = param_specs(config)
    if name == "reference":
        return ReferenceBackend(specs, device=device, dtype=dtype)
    return TorchBackend(specs, device=device, dtype=dtype)


def _why_not_cpu(
    found: InstructionSet | None, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    if device.type != "cpu":
        return "they run on the CPU alone"
    if found is None:
        return "they were not built for this machine (no C++ compiler at installation, or a CPU without AVX2)"
    return why_not(config, dtype)


_WEIGHT_TYPES = {torch.float32: WeightType.float32, torch.bfloat16: WeightType.bfloat16}
