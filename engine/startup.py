"""EngineConfig -> a loaded model behind an executor: everything that happens before the first request."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from engine.advice import what_would_fit
from engine.backends.base import Backend
from engine.backends.select import BACKENDS, make_backend
from engine.config import EngineConfig
from engine.decode_graphs import CudaCapture, DecodeGraphs, padded_sizes
from engine.errors import ConfigurationError
from engine.executor import Executor, LocalExecutor
from engine.machine import device_memory, show_bytes
from engine.memory import kv_cache_bytes, meter_of, num_kv_blocks
from engine.models.registry import build_model
from engine.plan import Plan, kv_bytes_per_token, plan_model
from engine.profile import measure_steps
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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def start(config: EngineConfig, *, progress: bool = False) -> tuple[Executor, EngineInfo]:
    """Load the model and size the cache. Raises WeightsError for the checkpoint's faults, ConfigurationError for
    ours.
    """
    _check_options(config)
    device = pick_device(config.device)
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

    kv_cache_dtype = _kv_cache_dtype(config, backend)
    # A request may ask for more experts than the model's own K.
    plan = _plan(config, model_config, dtype_name, max_model_len, router.max_choices, backend)
    _check_memory(plan, config, device)
    max_num_batched_tokens, bytes_per_token = plan.max_num_batched_tokens, plan.kv_bytes_per_token
    could_narrow = backend.has_fp8_kv_cache and kv_cache_dtype is None
    num_blocks_in = partial(
        num_kv_blocks,
        bytes_per_token=bytes_per_token,
        fp8_bytes_per_token=kv_bytes_per_token(model_config, dtype_name, "fp8") if could_narrow else None,
        block_size=config.block_size,
        max_model_len=max_model_len,
    )
    if config.kv_cache_memory_bytes is not None:
        num_blocks_in(config.kv_cache_memory_bytes)  # too little: better said now than after a long load
    meter = meter_of(device)
    replays = backend.name == "cuda" and not config.enforce_eager
    held = 0 if meter is None else meter.allocated()
    if checkpoint is not None and config.load_format == "auto":
        report = load(checkpoint, backend, device=device, progress=progress)
    else:
        report = dummy.load(model_config, backend, device=device, dtype=DTYPES[dtype_name], seed=config.seed)

    measured = {"weights": backend.weight_bytes}
    if meter is not None:
        meter.reset()
        measured["weights"] = meter.allocated() - held
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
    new_cache = partial(
        backend.new_kv_cache,
        model_config.num_layers,
        block_size=config.block_size,
        shape=model.attention_shape,
        dtype=kv_cache_dtype,
    )
    step_bytes = plan.activation_bytes
    if meter is not None:
        steps = measure_steps(
            model,
            new_cache(num_blocks=1),
            config,
            model_config,
            record,
            meter,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_choices=router.max_choices,
        )
        meter.reset()
        step_bytes = steps.step
        measured["activations"] = steps.step + meter.allocated() - measured["weights"] - held
        measured["CUDA graphs"] = steps.decode if replays else 0
        measured["CUDA itself"] = meter.total() - meter.free() - meter.allocated()
    graph_bytes = measured.get("CUDA graphs", plan.graph_bytes)
    num_blocks = num_blocks_in(kv_cache_bytes(config, meter, step_bytes=step_bytes, graph_bytes=graph_bytes))
    cache = new_cache(num_blocks=num_blocks)
    measured["KV cache"] = cache.keys.nbytes + cache.values.nbytes
    graphs = None
    if replays and meter is not None and device.type == "cuda":
        free = meter.free()
        graphs = DecodeGraphs(
            model,
            cache,
            steering,
            record,
            sizes=padded_sizes(config.max_num_seqs),
            widths=(model_config.num_experts_per_tok, router.max_choices),
            hidden_size=model_config.hidden_size,
            vocab_size=model_config.vocab_size,
            max_model_len=max_model_len,
            capture=CudaCapture(device),
            progress=progress,
        )
        measured["CUDA graphs"] = free - meter.free()
    eos_token_ids = frozenset(model_config.eos_token_ids)
    runner = Runner(model, cache, steering, record=record, graphs=graphs, eos_token_ids=eos_token_ids)
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
            activations=measured.get("activations", plan.activation_bytes),
            graphs=graph_bytes,
            total=plan.memory_bytes,
            predicted=_predicted(plan, config, num_blocks, measured),
            measured=measured,
        ),
        pid=os.getpid(),
    )
    return LocalExecutor(runner, runs_ahead=device.type == "cuda"), info


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
    if config.kv_cache_dtype not in ("auto", "fp8"):
        raise ConfigurationError(f"kv_cache_dtype {config.kv_cache_dtype!r} is not auto or fp8")
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


def _kv_cache_dtype(config: EngineConfig, backend: Backend) -> torch.dtype | None:
    """None: the backend's own."""
    if config.kv_cache_dtype == "auto":
        return None
    if backend.name != "cuda":
        raise ConfigurationError(f"kv_cache_dtype {config.kv_cache_dtype} is for backend cuda, not {backend.name}")
    if not backend.has_fp8_kv_cache:
        raise ConfigurationError("kv_cache_dtype fp8 needs a card of compute capability 8.9 or newer")
    return torch.float8_e4m3fn


def _plan(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: str,
    max_model_len: int,
    max_choices: int,
    backend: Backend,
) -> Plan:
    """What `mixserve plan` says of this device."""
    device = backend.device
    return plan_model(
        model_config,
        device=device.type,
        card=_device_name(device),
        backend=backend.name,
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        memory_bytes=device_memory(device.type),
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_choices=max_choices,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )


def _check_memory(plan: Plan, config: EngineConfig, device: torch.device) -> None:
    """Where weights cannot fit, or on a GPU the longest sequence beside them, the start ends here, rather than in an
    allocation that fails late or in a machine that swaps. What a step takes is measured later."""
    least = plan.weight_bytes
    needs = [f"the weights take {show_bytes(least)} in {plan.quantization or plan.dtype}"]
    if device.type == "cuda" and config.kv_cache_memory_bytes is None:
        sequence = plan.max_model_len * plan.kv_bytes_per_token
        needs.append(f"one sequence of {plan.max_model_len:,} tokens {show_bytes(sequence)}")
        least += sequence
    if least > plan.budget_bytes:
        raise ConfigurationError(
            f"{', '.join(needs)}; this device has {show_bytes(plan.memory_bytes)} and may use "
            f"{plan.gpu_memory_utilization * 100:g}% of it. {what_would_fit(plan)}"
        )
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes > plan.memory_bytes:
        raise ConfigurationError(
            f"kv_cache_memory_bytes {config.kv_cache_memory_bytes:,} is more than this device has "
            f"({plan.memory_bytes:,} bytes)"
        )


def _predicted(plan: Plan, config: EngineConfig, num_blocks: int, measured: Mapping[str, int]) -> dict[str, int]:
    """What was planned of each kind that was measured. A cache whose size somebody chose is its tokens' size."""
    chosen = config.kv_cache_memory_bytes is not None or "activations" not in measured
    tokens = num_blocks * config.block_size if chosen else plan.max_kv_tokens
    planned = {
        "weights": plan.weight_bytes,
        "activations": plan.activation_bytes,
        "CUDA graphs": plan.graph_bytes,
        "CUDA itself": plan.runtime_bytes,
        "KV cache": tokens * plan.kv_bytes_per_token,
    }
    return {kind: planned[kind] for kind in measured}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
