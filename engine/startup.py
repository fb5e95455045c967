"""EngineConfig -> a loaded model behind an executor: everything that happens before the first request."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from engine.backends.base import Backend, BlockBackend, KVCache, LayerBackend
from engine.backends.select import BACKENDS, make_backend
from engine.config import EngineConfig
from engine.decode_graphs import CudaCapture, DecodeGraphs, padded_sizes
from engine.errors import ConfigurationError
from engine.executor import Executor, LocalExecutor
from engine.machine import device_memory
from engine.memory import MemoryMeter, available_host_memory, kv_cache_bytes, meter_of
from engine.models.decoder import Decoder
from engine.models.registry import build_model
from engine.plan import ALL_QUANTIZATIONS, KV_CACHE_DTYPES, MemoryKind, Plan, plan_model
from engine.profile import StepMemory, measure_steps
from engine.routing.base import Router
from engine.routing.record import RoutingRecord
from engine.routing.select import check_options, make_router, model_top_k
from engine.routing.steering import SteeringTable
from engine.runner import Runner
from engine.startup_checks import check_memory, num_blocks_in, predicted
from engine.types import EngineInfo, MemoryUse
from weights import dummy
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.config import ModelConfig, load_config
from weights.loader import LoadReport, load
from weights.params import ParamKind
from weights.reader import resolve

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """What is to run, and on what."""

    config: EngineConfig
    checkpoint: Checkpoint | None
    """None: dummy weights."""
    model_config: ModelConfig
    """With the K that the router has."""
    device: torch.device
    dtype: str
    backend: LayerBackend | BlockBackend
    router: Router
    model: Decoder
    kv_cache_dtype: torch.dtype | None
    """None: the backend's own."""
    plan: Plan

    @property
    def replays(self) -> bool:
        """Whether decodes are replayed as CUDA graphs."""
        return self.backend.name == "cuda" and not self.config.enforce_eager


def start(config: EngineConfig, *, progress: bool = False) -> tuple[Executor, EngineInfo]:
    """Load the model and size the cache. Raises WeightsError for the checkpoint's faults, ConfigurationError for
    ours.
    """
    _check_options(config)
    setup = _choose(config)
    could_narrow = setup.backend.has_fp8_kv_cache and setup.kv_cache_dtype is None
    check_memory(setup.plan, block_size=config.block_size, could_narrow=could_narrow)
    meter = meter_of(setup.device)
    held = 0 if meter is None else meter.allocated()
    report = _load(setup, progress=progress)
    measured = {MemoryKind.WEIGHTS: setup.backend.weight_bytes}
    if meter is not None:
        meter.reset()
        measured[MemoryKind.WEIGHTS] = meter.allocated() - held
    steps = StepMemory(setup.plan.activation_bytes, setup.plan.graph_bytes)
    steering = SteeringTable.for_model(setup.model_config, num_slots=config.max_num_seqs + 1, device=setup.device)
    record = _record(setup)
    if meter is not None:
        steps = _measure(setup, record, meter)
        meter.reset()
        others = meter.allocated() - held - measured[MemoryKind.WEIGHTS]
        measured[MemoryKind.ACTIVATIONS] = steps.step + others
        measured[MemoryKind.GRAPHS] = steps.decode
        measured[MemoryKind.RUNTIME] = meter.total() - meter.free() - meter.allocated()
    num_bytes = kv_cache_bytes(config, meter, step_bytes=steps.step, graph_bytes=steps.decode)
    num_blocks = num_blocks_in(num_bytes, setup.plan, block_size=config.block_size, could_narrow=could_narrow)
    cache = _new_cache(setup, num_blocks)
    measured[MemoryKind.KV_CACHE] = cache.keys.nbytes + cache.values.nbytes
    graphs = None
    if setup.replays and meter is not None and setup.device.type == "cuda":
        free = meter.free()
        graphs = _capture(setup, cache, steering, record, progress=progress)
        measured[MemoryKind.GRAPHS] = free - meter.free()
    eos_token_ids = frozenset(setup.model_config.eos_token_ids)
    runner = Runner(setup.model, cache, steering, record=record, graphs=graphs, eos_token_ids=eos_token_ids)
    info = _info(setup, report, measured, num_blocks=num_blocks, graph_bytes=steps.decode)
    return LocalExecutor(runner, runs_ahead=setup.device.type == "cuda"), info


def _choose(config: EngineConfig) -> _Setup:
    """Everything that is decided before a weight is read."""
    device = pick_device(config.device)
    path = resolve(config.model, revision=config.revision)
    # A folder with nothing but a config.json is enough for dummy weights.
    checkpoint = open_checkpoint(path) if config.load_format == "auto" or path.suffix == ".gguf" else None
    model_config = checkpoint.config if checkpoint is not None else load_config(path)
    dtype = pick_dtype(config.dtype, model_config, device)
    backend = make_backend(
        config.backend, model_config, device=device, dtype=DTYPES[dtype], quantization=config.quantization
    )
    router = make_router(
        model_config,
        router=config.router,
        capacity_factor=config.capacity_factor,
        simulation=config.routing_simulation,
    )
    model_config = replace(model_config, num_experts_per_tok=model_top_k(model_config, router))
    return _Setup(
        config=config,
        checkpoint=checkpoint if config.load_format == "auto" else None,
        model_config=model_config,
        device=device,
        dtype=dtype,
        backend=backend,
        router=router,
        model=build_model(model_config, backend, router),
        kv_cache_dtype=_kv_cache_dtype(config, backend),
        plan=_plan(config, model_config, dtype, router, backend),
    )


def _load(setup: _Setup, *, progress: bool) -> LoadReport:
    if setup.checkpoint is not None:
        return load(setup.checkpoint, setup.backend, device=setup.device, progress=progress)
    dtype = DTYPES[setup.dtype]
    return dummy.load(setup.model_config, setup.backend, device=setup.device, dtype=dtype, seed=setup.config.seed)


def _record(setup: _Setup) -> RoutingRecord | None:
    if not setup.config.record_routing:
        return None
    return RoutingRecord(
        num_layers=setup.model_config.num_layers,
        num_experts=setup.model_config.num_experts,
        top_k=setup.model_config.num_experts_per_tok,
        max_tokens=setup.plan.max_num_batched_tokens,
        device=setup.device,
    )


def _new_cache(setup: _Setup, num_blocks: int) -> KVCache:
    return setup.backend.new_kv_cache(
        setup.model_config.num_layers,
        num_blocks,
        block_size=setup.config.block_size,
        shape=setup.model.attention_shape,
        dtype=setup.kv_cache_dtype,
    )


def _measure(setup: _Setup, record: RoutingRecord | None, meter: MemoryMeter) -> StepMemory:
    """What has to stay free for steps, and for graphs if there are any."""
    steps = measure_steps(
        setup.model,
        _new_cache(setup, 1),
        setup.config,
        setup.model_config,
        record,
        meter,
        max_num_batched_tokens=setup.plan.max_num_batched_tokens,
        max_model_len=setup.plan.max_model_len,
        max_choices=setup.router.max_choices,
    )
    return steps if setup.replays else replace(steps, decode=0)


def _capture(
    setup: _Setup, cache: KVCache, steering: SteeringTable, record: RoutingRecord | None, *, progress: bool
) -> DecodeGraphs:
    return DecodeGraphs(
        setup.model,
        cache,
        steering,
        record,
        sizes=padded_sizes(min(setup.config.max_num_seqs, setup.plan.max_num_batched_tokens)),
        widths=(setup.model_config.num_experts_per_tok, setup.router.max_choices),
        hidden_size=setup.model_config.hidden_size,
        vocab_size=setup.model_config.vocab_size,
        max_model_len=setup.plan.max_model_len,
        capture=CudaCapture(setup.device),
        progress=progress,
    )


def _info(
    setup: _Setup, report: LoadReport, measured: dict[MemoryKind, int], *, num_blocks: int, graph_bytes: int
) -> EngineInfo:
    config, model_config, router, plan = setup.config, setup.model_config, setup.router, setup.plan
    return EngineInfo(
        model=config.model,
        model_type=model_config.model_type,
        device=_device_name(setup.device),
        dtype=setup.dtype,
        backend=setup.backend.name,
        vocab_size=model_config.vocab_size,
        num_layers=model_config.num_layers,
        num_experts=model_config.num_experts,
        num_experts_per_tok=model_config.num_experts_per_tok,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=config.enable_prefix_caching and _repeatable(config, router),
        router=config.routing_simulation or config.router or model_config.router_type,
        capacity_factor=router.capacity_factor,
        routing_simulation=config.routing_simulation,
        record_routing=config.record_routing,
        max_experts_per_tok=router.max_choices,
        expert_params=plan.params.get(ParamKind.EXPERT, 0) // model_config.num_experts,
        eos_token_ids=model_config.eos_token_ids,
        total_params=plan.total_params,
        active_params=plan.active_params,
        load_seconds=report.seconds,
        load_bytes=report.num_bytes,
        memory=MemoryUse(
            weights={str(kind): size for kind, size in plan.weight_bytes_by_kind.items()},
            kv_cache=num_blocks * config.block_size * plan.kv_bytes_per_token,
            activations=measured.get(MemoryKind.ACTIVATIONS, plan.activation_bytes),
            graphs=graph_bytes,
            total=plan.memory_bytes,
            predicted=predicted(plan, num_tokens=num_blocks * config.block_size, kinds=measured),
            measured={str(kind): size for kind, size in measured.items()},
        ),
        pid=os.getpid(),
    )


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
    if config.quantization not in (None, *ALL_QUANTIZATIONS):
        raise ConfigurationError(f"quantization {config.quantization!r} is not one of {', '.join(ALL_QUANTIZATIONS)}")
    if config.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigurationError(f"kv_cache_dtype {config.kv_cache_dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
    check_options(router=config.router, capacity_factor=config.capacity_factor, simulation=config.routing_simulation)
    if config.load_format not in ("auto", "dummy"):
        raise ConfigurationError(f"load_format {config.load_format!r} is not one of auto, dummy")


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


def _plan(config: EngineConfig, model_config: ModelConfig, dtype: str, router: Router, backend: Backend) -> Plan:
    """What `mixserve plan` says of this device. A request may ask for more experts than the model's own K."""
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
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_choices=router.max_choices,
        gpu_memory_utilization=config.gpu_memory_utilization,
        has_fp8_kv_cache=backend.has_fp8_kv_cache,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        free_bytes=available_host_memory() if device.type == "cpu" else None,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
