"""EngineConfig -> a loaded model behind an executor: everything that happens before the first request."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import partial

import torch

from engine.backends.base import Backend
from engine.backends.select import BACKENDS, make_backend
from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.executor import Executor, LocalExecutor
from engine.memory import kv_cache_bytes, num_kv_blocks
from engine.models.decoder import Decoder
from engine.models.registry import build_model
from engine.plan import Plan, activation_bytes, device_memory, kv_bytes_per_token, plan_model
from engine.profile import measure_activations
from engine.routing.base import Router
from engine.routing.record import RoutingRecord
from engine.routing.select import check_options, make_router, model_top_k
from engine.routing.steering import SteeringTable
from engine.runner import Runner
from engine.types import EngineInfo, MemoryUse
from weights import dummy
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig, load_config
from weights.loader import load
from weights.params import ParamKind
from weights.reader import resolve

_STEP_TOKENS = {"cuda": 2048, "cpu": 160}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def start(config: EngineConfig, *, progress: bool = False) -> tuple[Executor, EngineInfo]:
    """Load the model and size the cache. Raises WeightsError for the checkpoint's faults, ConfigurationError for
    ours.
    """
    _check_options(config)
    device = pick_device(config.device)
    max_num_batched_tokens = config.max_num_batched_tokens or _STEP_TOKENS[device.type]
    path = resolve(config.model, revision=config.revision)
    # A folder with nothing but a config.json is enough for dummy weights.
    checkpoint = open_checkpoint(path) if config.load_format == "auto" or path.suffix == ".gguf" else None
    model_config = checkpoint.config if checkpoint is not None else load_config(path)
    dtype_name = pick_dtype(config.dtype, model_config, device)
    max_model_len = _max_model_len(config, model_config)
    backend = make_backend(
        config.backend, model_config, device=device, dtype=DTYPES[dtype_name], quantization=config.quantization
    )
    router = make_router(
        model_config,
        router=config.router,
        capacity_factor=config.capacity_factor,
        simulation=config.routing_simulation,
    )
    model_config = replace(model_config, num_experts_per_tok=model_top_k(model_config, router))
    model = build_model(model_config, backend, router)

    plan = _plan_weights(config, model_config, dtype_name, max_model_len, max_num_batched_tokens, backend)
    bytes_per_token = kv_bytes_per_token(model_config, dtype_name)
    num_blocks_in = partial(
        num_kv_blocks, bytes_per_token=bytes_per_token, block_size=config.block_size, max_model_len=max_model_len
    )
    if config.kv_cache_memory_bytes is not None:
        num_blocks_in(config.kv_cache_memory_bytes)  # too little: better said now than after a long load
    if checkpoint is not None and config.load_format == "auto":
        report = load(checkpoint, backend, progress=progress)
    else:
        report = dummy.load(model_config, backend, device=device, dtype=DTYPES[dtype_name], seed=config.seed)

    steering = SteeringTable.for_model(model_config, num_slots=config.max_num_seqs + 1, device=device)
    record = None
    if config.record_routing:
        record = RoutingRecord(
            num_layers=model_config.num_layers,
            num_experts=model_config.num_experts,
            top_k=model_config.num_experts_per_tok,
            max_tokens=max_num_batched_tokens,
            device=device,
        )
    # A request may ask for more experts than the model's own K.
    widest = replace(model_config, num_experts_per_tok=router.max_choices)
    activations = _activations(config, widest, dtype_name, max_model_len, model, record, max_num_batched_tokens)
    num_blocks = num_blocks_in(kv_cache_bytes(config, device, activation_bytes=activations))
    cache = backend.new_kv_cache(model_config.num_layers, num_blocks, config.block_size, model.attention_shape)
    eos_token_ids = frozenset(model_config.eos_token_ids)
    runner = Runner(model, cache, steering, record=record, eos_token_ids=eos_token_ids)
    params = plan.params
    info = EngineInfo(
        model=config.model,
        model_type=model_config.model_type,
        device=_device_name(device),
        dtype=dtype_name,
        backend=backend.name,
        vocab_size=model_config.vocab_size,
        num_layers=model_config.num_layers,
        num_experts=model_config.num_experts,
        num_experts_per_tok=model_config.num_experts_per_tok,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=config.enable_prefix_caching and _repeatable(config, router),
        router=config.routing_simulation or config.router or model_config.router_type,
        capacity_factor=router.capacity_factor,
        routing_simulation=config.routing_simulation,
        record_routing=config.record_routing,
        max_experts_per_tok=router.max_choices,
        expert_params=params.get(ParamKind.EXPERT, 0) // model_config.num_experts,
        eos_token_ids=model_config.eos_token_ids,
        total_params=plan.total_params,
        active_params=plan.active_params,
        load_seconds=report.seconds,
        load_bytes=report.num_bytes,
        memory=MemoryUse(
            weights={str(kind): size for kind, size in plan.weight_bytes_by_kind.items()},
            kv_cache=num_blocks * config.block_size * bytes_per_token,
            activations=activations,
            total=device_memory(device.type),
        ),
        pid=os.getpid(),
    )
    return LocalExecutor(runner), info


def pick_device(name: str) -> torch.device:
    """auto -> the GPU where there is one, else the CPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigurationError("device cuda was asked for, but torch sees no GPU")
    return torch.device("cuda", 0) if available and name != "cpu" else torch.device("cpu")


def pick_dtype(name: str, model_config: ModelConfig, device: torch.device) -> str:
    """auto -> the checkpoint's dtype, but float16 instead of bfloat16 on a GPU that has none."""
    if name == "auto":
        name = model_config.dtype
        if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = "float16"
    if name not in DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return name


def _check_options(config: EngineConfig) -> None:
    for field in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len", "kv_cache_memory_bytes"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ConfigurationError(f"{field} must be at least 1, not {value}")
    if config.max_num_queued_requests < 0:
        raise ConfigurationError(f"max_num_queued_requests must be at least 0, not {config.max_num_queued_requests}")
    if not (math.isfinite(config.gpu_memory_utilization) and 0 < config.gpu_memory_utilization <= 1):
        raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], not {config.gpu_memory_utilization}")
    if config.dtype not in ("auto", *DTYPES):
        raise ConfigurationError(f"dtype {config.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if config.backend not in BACKENDS:
        raise ConfigurationError(f"backend {config.backend!r} is not one of {', '.join(BACKENDS)}")
    if config.quantization not in (None, "int8", "fp8"):
        raise ConfigurationError(f"quantization {config.quantization!r} is not int8 or fp8")
    check_options(router=config.router, capacity_factor=config.capacity_factor, simulation=config.routing_simulation)
    if config.load_format not in ("auto", "dummy"):
        raise ConfigurationError(f"load_format {config.load_format!r} is not one of auto, dummy")


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    context = model_config.max_position_embeddings
    if config.max_model_len is None:
        return context
    if config.max_model_len > context:
        raise ConfigurationError(
            f"max_model_len {config.max_model_len} is over the model's context of {context} tokens"
        )
    return config.max_model_len


def _repeatable(config: EngineConfig, router: Router) -> bool:
    """Whether a token's hidden states depend on the tokens before it alone: not on who else is in the batch, nor on
    chance. Otherwise no block may serve another request."""
    return router.capacity_factor is None and not router.draws and config.routing_simulation is None


def _plan_weights(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: str,
    max_model_len: int,
    max_num_batched_tokens: int,
    backend: Backend,
) -> Plan:
    """What `mixserve plan` says. Where weights cannot fit, the start ends here, rather than in an allocation that fails
    late or in a machine that swaps."""
    total = device_memory(backend.device.type)
    plan = plan_model(
        model_config,
        dtype=dtype,
        quantization=config.quantization,
        experts_only=backend.name == "cuda",
        memory_bytes=total,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    if plan.weight_bytes > plan.budget_bytes:
        raise ConfigurationError(
            f"the weights take {plan.weight_bytes / 1e9:.1f} GB in {config.quantization or dtype}, this device has "
            f"{total / 1e9:.1f} GB and may use {config.gpu_memory_utilization:.0%} of it; `mixserve plan` tells what "
            f"would fit"
        )
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes > total:
        raise ConfigurationError(
            f"kv_cache_memory_bytes {config.kv_cache_memory_bytes:,} is more than this device has ({total:,} bytes)"
        )
    return plan


def _activations(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: str,
    max_model_len: int,
    model: Decoder,
    record: RoutingRecord | None,
    max_num_batched_tokens: int,
) -> int:
    """Peak of one step: measured on a GPU, computed on the CPU, whose allocator does not tell."""
    if model.backend.device.type == "cuda":
        return measure_activations(
            model,
            config,
            model_config,
            record,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
    return activation_bytes(
        model_config,
        dtype,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
