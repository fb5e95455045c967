"""What a model takes in memory, from its configuration alone: no weight is read and nothing is allocated.

The engine plans its own memory with the same functions, so what `mixserve plan` says is what a server then does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.activations import ITEMSIZE, StepSize, activation_bytes, graph_bytes
from engine.errors import ConfigurationError
from engine.machine import device_memory, gpu_name
from engine.step_tokens import default_step_tokens
from weights.config import ModelConfig
from weights.families import mixtral
from weights.params import ParamKind, ParamSpec

BATCH_CONTEXT = 4096
"""Tokens a sequence at which `Plan.max_batch` counts sequences."""

QUANTIZATIONS = {"cuda": ("fp8", "int8"), "cpu": ("int8",)}
"""What weights may be quantised to, by backend; the others have none."""

_RUNTIME = 512 << 20
"""What CUDA and the code of the kernels take of a GPU: a guess, the engine measures it."""

_SCALE = 4
"""Bytes of the scale that each row of a quantised matrix has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the memory of one device goes. All sizes are in bytes, all lengths in tokens; options as the engine's."""

    config: ModelConfig
    device: str
    """cpu or cuda"""
    backend: str
    dtype: str
    quantization: str | None
    """What weights are held in: fp8 too where a checkpoint comes so."""
    kv_cache_dtype: str
    """auto (the dtype) or fp8."""
    memory_bytes: int
    gpu_memory_utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_choices: int
    """The most experts that a request may ask for."""

    @property
    def params(self) -> dict[ParamKind, int]:
        """Number of parameters by kind, as they are held: a tied lm_head is none of its own."""
        return params_by_kind(self.config)

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def active_params(self) -> int:
        """Parameters that one token's forward pass goes through."""
        return active_params(self.config)

    @property
    def weight_bytes_by_kind(self) -> dict[ParamKind, int]:
        """Scales included."""
        sizes = dict.fromkeys(self.params, 0)
        for spec in mixtral.param_specs(self.config):
            size = weight_bytes(spec, backend=self.backend, dtype=self.dtype, quantization=self.quantization)
            sizes[spec.kind] += size
        return sizes

    @property
    def weight_bytes(self) -> int:
        return sum(self.weight_bytes_by_kind.values())

    @property
    def active_bytes(self) -> int:
        """Of the weights that one token's forward pass reads."""
        experts = self.weight_bytes_by_kind.get(ParamKind.EXPERT, 0)
        idle = self.config.num_experts - self.config.num_experts_per_tok
        return self.weight_bytes - experts * idle // self.config.num_experts

    @property
    def activation_bytes(self) -> int:
        return activation_bytes(self.config, self._step, backend=self.backend)

    @property
    def graph_bytes(self) -> int:
        return graph_bytes(self.config, self._step, backend=self.backend)

    @property
    def runtime_bytes(self) -> int:
        """What the device's own software takes."""
        return _RUNTIME if self.device == "cuda" else 0

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.config, self.dtype, self.kv_cache_dtype)

    @property
    def budget_bytes(self) -> int:
        """What everything may take together."""
        return int(self.memory_bytes * self.gpu_memory_utilization)

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.runtime_bytes

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside everything else; 0 when not even that fits."""
        return max(0, self.budget_bytes - self.fixed_bytes) // self.kv_bytes_per_token

    @property
    def required_bytes(self) -> int:
        """What the budget must hold at least: everything, and one sequence of `max_model_len` tokens."""
        return self.fixed_bytes + self.max_model_len * self.kv_bytes_per_token

    @property
    def required_memory_bytes(self) -> int:
        """The smallest memory whose budget does."""
        return math.ceil(self.required_bytes / self.gpu_memory_utilization)

    @property
    def fits(self) -> bool:
        return self.required_bytes <= self.budget_bytes

    @property
    def max_batch(self) -> int:
        """Sequences of `BATCH_CONTEXT` tokens that fit at once."""
        return self.max_kv_tokens // BATCH_CONTEXT

    @property
    def _step(self) -> StepSize:
        return StepSize(
            dtype=self.dtype,
            quantization=self.quantization,
            num_tokens=self.max_num_batched_tokens,
            num_seqs=self.max_num_seqs,
            context=self.max_model_len,
            num_choices=self.max_choices,
        )

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "total_params": self.total_params,
            "active_params": self.active_params,
            "params": {kind.value: count for kind, count in self.params.items()},
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "graph_bytes": self.graph_bytes,
            "runtime_bytes": self.runtime_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "memory_bytes": self.memory_bytes,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "budget_bytes": self.budget_bytes,
            "required_bytes": self.required_bytes,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_kv_tokens": self.max_kv_tokens,
            "max_batch_at_4096": self.max_batch,
            "fits": self.fits,
        }


def plan_model(
    config: ModelConfig,
    *,
    device: str = "auto",
    card: str | None = None,
    backend: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int = 256,
    max_choices: int | None = None,
    gpu_memory_utilization: float = 0.9,
) -> Plan:
    """Plans `config` on a device of `memory_bytes` (None: this machine's), with the engine's options of the same names.

    `device` auto: a GPU where there is one, or where `memory_bytes` are a GPU's to be. `card`: the GPU's name, None:
    this machine's where its memory is meant. `backend` None: cuda on a GPU, on the CPU its own. `dtype` None: the
    checkpoint's. `max_model_len` None: the checkpoint's context. `max_num_batched_tokens` None: the engine's default.
    `max_choices` None: all experts. Raises ConfigurationError for what the backend does not have, an unknown dtype, or
    a size that cannot be.
    """
    dtype = config.dtype if dtype is None else dtype
    if dtype not in ITEMSIZE:
        raise ConfigurationError(f"dtype {dtype!r} is not known: use {', '.join(ITEMSIZE)}")
    if device == "auto":
        device = "cuda" if memory_bytes is not None or gpu_name() is not None else "cpu"
    if card is None and memory_bytes is None and device == "cuda":
        card = gpu_name()
    if backend is None:
        backend = usual_backend(device, dtype)
    quantization = held_quantization(backend, config, quantization)
    if quantization is not None and quantization not in QUANTIZATIONS.get(backend, ()):
        raise ConfigurationError(f"backend {backend} has no {quantization} weights")
    if kv_cache_dtype not in kv_cache_dtypes(backend):
        raise ConfigurationError(f"backend {backend} has no {kv_cache_dtype} KV cache")
    if max_num_batched_tokens is None:
        max_num_batched_tokens = default_step_tokens(
            config,
            device=device,
            card=None if dtype == "float32" else card,
            quantization=quantization,
            max_num_seqs=max_num_seqs,
        )
    max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
    memory_bytes = device_memory(device) if memory_bytes is None else memory_bytes
    sizes = {
        "memory_bytes": memory_bytes,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], not {gpu_memory_utilization}")
    return Plan(
        config=config,
        device=device,
        backend=backend,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        max_choices=config.num_experts if max_choices is None else max_choices,
        **sizes,
    )


def usual_backend(device: str, dtype: str) -> str:
    """Which backend is planned for: on the CPU the one that serves by default, on a GPU cuda."""
    if device == "cuda":
        return "cuda"
    return "torch" if dtype == "float16" else "cpu"


def held_quantization(backend: str, config: ModelConfig, quantization: str | None) -> str | None:
    """What `backend` holds weights in: backend cuda keeps experts that come in float8, unless another quantization is
    asked for.
    """
    return "fp8" if quantization is None and backend == "cuda" and config.fp8_experts else quantization


def kv_cache_dtypes(backend: str) -> Iterator[str]:
    """What the KV cache of `backend` may be."""
    yield "auto"
    if backend == "cuda":
        yield "fp8"


def weight_bytes(spec: ParamSpec, *, backend: str, dtype: str, quantization: str | None) -> int:
    """Bytes of a parameter as `backend` holds it.

    Norms and routers are never quantised, and on the CPU they are float32: next to nothing, and what they decide is
    decided for good. Backend cuda quantises the experts alone. A quantised matrix has a float32 scale for each row.

    Example, w2 of a layer of Mixtral 8x7B [8, 4096, 14336] in fp8: 469,762,048 + 4 * 8 * 4096 = 469,893,120.
    """
    num_elements = math.prod(spec.shape)
    if spec.kind in (ParamKind.NORM, ParamKind.ROUTER):
        return num_elements * (4 if backend == "cpu" else ITEMSIZE[dtype])
    if quantization is None or (backend == "cuda" and spec.kind is not ParamKind.EXPERT):
        return num_elements * ITEMSIZE[dtype]
    return num_elements + _SCALE * math.prod(spec.shape[:-1])


def params_by_kind(config: ModelConfig) -> dict[ParamKind, int]:
    """Number of parameters of each kind, in the order of `ParamKind`; kinds without any are left out."""
    counts = dict.fromkeys(ParamKind, 0)
    for spec in mixtral.param_specs(config):
        counts[spec.kind] += math.prod(spec.shape)
    return {kind: count for kind, count in counts.items() if count}


def active_params(config: ModelConfig) -> int:
    """Parameters of one token's forward pass: everything shared, and K of the E experts of each layer.

    The whole embedding counts, as it does in the figures models are known by: 12,879,925,248 for Mixtral 8x7B.
    """
    counts = params_by_kind(config)
    experts = counts.get(ParamKind.EXPERT, 0)
    return sum(counts.values()) - experts + experts * config.num_experts_per_tok // config.num_experts


def kv_bytes_per_token(config: ModelConfig, dtype: str, kv_cache_dtype: str = "auto") -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers.

    Mixtral 8x7B in bfloat16: 2 (K and V) * 32 layers * 8 KV heads * 128 * 2 bytes = 131,072; in fp8 half of it.
    """
    size = 1 if kv_cache_dtype == "fp8" else ITEMSIZE[dtype]
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
