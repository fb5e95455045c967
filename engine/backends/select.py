"""The backend that serves a model on a device."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from engine.backends.base import BlockBackend, LayerBackend
from engine.backends.cpu import CpuBackend, why_not
from engine.backends.reference import ReferenceBackend
from engine.backends.torch import TorchBackend
from engine.errors import ConfigurationError
from engine.kernels.cpu.library import InstructionSet, WeightType, best
from engine.plan import held_quantization
from weights.config import ModelConfig
from weights.families.mixtral import param_specs

log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "torch", "reference")


def make_backend(
    name: str, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> LayerBackend | BlockBackend:
    """The backend called `name`. auto: the CPU's own kernels where they can serve the model, else torch's operations.
    cuda, Triton's kernels, has to be asked for by name. A checkpoint of float8 is dequantised by all but cuda.

    Raises ConfigurationError when it cannot serve the model.
    """
    assert name in BACKENDS
    if name == "cuda":
        return _cuda_backend(config, device, dtype, held_quantization(name, config, quantization))
    if quantization == "fp8":
        raise ConfigurationError("only backend cuda has fp8 weights")
    if name in ("auto", "cpu"):
        found = best()
        reason = _why_not_cpu(found, config, device, dtype, int8=quantization == "int8")
        if reason is None:
            assert found is not None
            weight_type = WeightType.int8 if quantization == "int8" else _WEIGHT_TYPES[dtype]
            return CpuBackend(config, dtype=dtype, weight_type=weight_type, instruction_set=found)
        if name == "auto" and quantization is not None and device.type == "cuda":
            raise ConfigurationError(f"quantization {quantization} needs --backend cuda on a GPU")
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


def _cuda_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> BlockBackend:
    if device.type != "cuda":
        raise ConfigurationError("backend cuda needs a GPU, and the model is to run on the CPU")
    if find_spec("triton") is None:
        raise ConfigurationError("backend cuda needs Triton, which is not installed")
    # Nothing else loads Triton: whoever needs no GPU need not have it.
    from engine.backends.cuda.backend import CudaBackend, why_not
    from engine.backends.cuda.card import Card

    card = Card.of(device)
    reason = why_not(config, card)
    if reason is not None:
        raise ConfigurationError(f"backend cuda cannot serve this model: {reason}")
    for line in card.next_best(dtype, quantization):
        log.warning("not everything is at its best on this card: %s", line)
    weight_dtype = card.weight_dtype(quantization)
    return CudaBackend(config, card, device=device, dtype=dtype, weight_dtype=weight_dtype)


def _why_not_cpu(
    found: InstructionSet | None, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, int8: bool
) -> str | None:
    if device.type != "cpu":
        return "they run on the CPU alone"
    if found is None:
        return "they were not built for this machine (no C++ compiler at installation, or a CPU without AVX2)"
    return why_not(config, dtype, int8=int8)


_WEIGHT_TYPES = {torch.float32: WeightType.float32, torch.bfloat16: WeightType.bfloat16}
