"""What a model takes in memory, from its configuration alone: no weight is read and nothing is allocated.

A server plans with the same functions before it loads, and refuses by them. What it then takes may differ: on a GPU it
measures what steps and graphs need, and the cache gets what is really left; on the CPU the cache has a limit
(`default_host_cache`), which counts here in the advice alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from engine.activations import ITEMSIZE, StepSize, activation_bytes, graph_bytes
from engine.errors import ConfigurationError
from engine.machine import default_host_cache, device_memory, gpu_name, gpu_reads_fp8
from engine.sizes import active_params, kv_bytes_per_token, params_by_kind, weight_bytes
from engine.step_tokens import default_step_tokens
from weights.config import ModelConfig
from weights.families import mixtral
from weights.params import ParamKind

BATCH_CONTEXT = 4096
"""Tokens a sequence at which `Plan.max_batch` counts sequences."""

QUANTIZATIONS = {"cuda": ("fp8", "int8"), "cpu": ("int8",)}
"""What weights may be quantised to, by backend; the others have none."""

ALL_QUANTIZATIONS = QUANTIZATIONS["cuda"]

KV_CACHE_DTYPES = ("auto", "fp8")
"""What a KV cache may be; fp8 is backend cuda's, on a card that has it."""

_RUNTIME = 512 << 20
"""What CUDA and the code of the kernels take of a GPU: a guess, the engine measures it."""

_MOST_CHOICES = {"switch": 1, "gshard": 2}
"""Routers whose definition says how many experts a token has."""


class MemoryKind(StrEnum):
    """What the memory of a device goes to."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRAPHS = "CUDA graphs"
    RUNTIME = "CUDA itself"
    KV_CACHE = "KV cache"


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
    step_tokens: int | None
    """What `max_num_batched_tokens` was asked to be; None: the default."""
    max_num_seqs: int
    max_choices: int
    """The most experts that a request may ask for."""
    card: str | None
    """The GPU's name, where it is known."""
    has_fp8_kv_cache: bool
    kv_cache_memory_bytes: int | None
    """The size of the KV cache, where somebody chose it; None: what is left."""
    free_bytes: int
    """What nobody holds of the memory before anything is loaded."""

    @property
    def kv_cache_dtypes(self) -> tuple[str, ...]:
        """What the KV cache may be."""
        return KV_CACHE_DTYPES if self.has_fp8_kv_cache else ("auto",)

    @property
    def max_num_batched_tokens(self) -> int:
        """By default it depends on the quantization."""
        if self.step_tokens is not None:
            return self.step_tokens
        return default_step_tokens(
            self.config,
            device=self.device,
            card=None if self.dtype == "float32" else self.card,
            quantization=self.quantization,
            max_num_seqs=self.max_num_seqs,
        )

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
    def sequence_bytes(self) -> int:
        """One sequence of `max_model_len` tokens in the KV cache."""
        return self.max_model_len * self.kv_bytes_per_token

    @property
    def required_bytes(self) -> int:
        """What the budget must hold at least: everything, and one sequence of `max_model_len` tokens or the cache that
        was chosen."""
        return self.fixed_bytes + (self.kv_cache_memory_bytes or self.sequence_bytes)

    @property
    def required_memory_bytes(self) -> int:
        """The smallest memory whose budget does."""
        return math.ceil(self.required_bytes / self.gpu_memory_utilization)

    @property
    def fits(self) -> bool:
        enough = self.kv_cache_memory_bytes is None or self.sequence_bytes <= self.kv_cache_memory_bytes
        return enough and self.required_bytes <= self.budget_bytes

    @property
    def max_batch(self) -> int:
        """Sequences of `BATCH_CONTEXT` tokens that fit at once."""
        return self.max_kv_tokens // BATCH_CONTEXT

    @property
    def host_cache_bytes(self) -> int:
        """The KV cache that a server on the CPU has by default."""
        return default_host_cache(self.free_bytes - self.weight_bytes)

    @property
    def parts(self) -> dict[MemoryKind, int]:
        """The budget by kind, with as large a KV cache as it leaves room for."""
        return {
            MemoryKind.WEIGHTS: self.weight_bytes,
            MemoryKind.ACTIVATIONS: self.activation_bytes,
            MemoryKind.GRAPHS: self.graph_bytes,
            MemoryKind.RUNTIME: self.runtime_bytes,
            MemoryKind.KV_CACHE: self.max_kv_tokens * self.kv_bytes_per_token,
        }

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
    has_fp8_kv_cache: bool | None = None,
    kv_cache_memory_bytes: int | None = None,
    free_bytes: int | None = None,
) -> Plan:
    """Plans `config` on a device of `memory_bytes` (None: this machine's), with the engine's options of the same names.

    `device` auto: a GPU where there is one, or where `memory_bytes` are a GPU's to be. `card`: the GPU's name, None:
    this machine's where its memory is meant. `backend` None: cuda on a GPU, on the CPU its own. `dtype` None: the
    checkpoint's. `max_model_len` None: the checkpoint's context. `max_num_batched_tokens` None: the engine's default.
    `max_choices` None: it and K are what the checkpoint's router makes of them. `has_fp8_kv_cache` None: as on this
    machine's GPU where its memory is meant, else as on a newest. `free_bytes` None: all of the memory. Raises
    ConfigurationError for what the backend does not have, an unknown dtype, or a size that cannot be.
    """
    dtype = config.dtype if dtype is None else dtype
    if dtype not in ITEMSIZE:
        raise ConfigurationError(f"dtype {dtype!r} is not known: use {', '.join(ITEMSIZE)}")
    if device == "auto":
        device = "cuda" if memory_bytes is not None or gpu_name() is not None else "cpu"
    here = memory_bytes is None and device == "cuda"
    if card is None and here:
        card = gpu_name()
    if backend is None:
        backend = usual_backend(device, dtype)
    quantization = held_quantization(backend, config, quantization)
    if quantization is not None and quantization not in QUANTIZATIONS.get(backend, ()):
        raise ConfigurationError(f"backend {backend} has no {quantization} weights")
    if has_fp8_kv_cache is None:
        has_fp8_kv_cache = backend == "cuda" and (gpu_reads_fp8() if here else True)
    if kv_cache_dtype not in KV_CACHE_DTYPES or (kv_cache_dtype == "fp8" and not has_fp8_kv_cache):
        where = " on this card" if backend == "cuda" else ""
        raise ConfigurationError(f"backend {backend} has no {kv_cache_dtype} KV cache{where}")
    memory_bytes = device_memory(device) if memory_bytes is None else memory_bytes
    sizes = {
        "memory_bytes": memory_bytes,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
    }
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    context = config.max_position_embeddings
    if max_model_len is not None and max_model_len > context:
        raise ConfigurationError(f"max_model_len {max_model_len} is over the model's context of {context} tokens")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], not {gpu_memory_utilization}")
    if max_choices is None:
        top_k, max_choices = router_choices(config)
        config = replace(config, num_experts_per_tok=top_k)
    return Plan(
        config=config,
        device=device,
        backend=backend,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        memory_bytes=memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=context if max_model_len is None else max_model_len,
        step_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_choices=max_choices,
        card=card,
        has_fp8_kv_cache=has_fp8_kv_cache,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        free_bytes=memory_bytes if free_bytes is None else free_bytes,
    )


def router_choices(config: ModelConfig) -> tuple[int, int]:
    """K of a request that does not steer, and the most experts that one may ask for, with the checkpoint's own router:
    what engine/routing/select.py says, without torch.
    """
    most = _MOST_CHOICES.get(config.router_type)
    return (config.num_experts_per_tok, config.num_experts) if most is None else (min(most, config.num_experts), most)


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
