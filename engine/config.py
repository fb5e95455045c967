"""EngineConfig: every option of the engine, fixed at construction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine. `None` and "auto" mean: decided from the checkpoint and the device at start."""

    model: str
    """A checkpoint folder, a .gguf file, or a hub repository id."""
    revision: str | None = None
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto (the checkpoint's), float32, float16 or bfloat16."""
    backend: str = "auto"
    """auto, cpu, cuda, torch or reference."""
    quantization: str | None = None
    """int8 or fp8: weights of 8 bits with a scale for each output channel, quantised as they are loaded."""
    kv_cache_dtype: str = "auto"
    """auto (the dtype), or fp8: keys and values in e4m3, as they are, without a scale. Backend cuda only."""
    load_format: str = "auto"
    """auto, or dummy: random weights of the right shapes, made on the device."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None: the checkpoint's context."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Token budget of one step; None: engine/step_tokens.py chooses by device and model."""
    block_size: int = 16
    """Tokens a KV-cache block."""
    enforce_eager: bool = False
    """On backend cuda: launch every kernel of a decode by itself, rather than replay CUDA graphs."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, activations, CUDA graphs and KV cache may take together."""
    kv_cache_memory_bytes: int | None = None
    """None: on a GPU what is left, on the CPU the smaller of 4 GiB and a quarter of free memory."""
    enable_prefix_caching: bool = True
    router: str | None = None
    """None: the checkpoint's. One of weights.config.ROUTER_TYPES, for experiments; noisy_topk then draws its noise."""
    capacity_factor: float | None = None
    """None: the checkpoint's. A capacity ties the requests of a batch together and turns prefix caching off."""
    routing_simulation: str | None = None
    """None: the router decides. even, zipf or one: it does not, for load tests on dummy weights."""
    record_routing: bool = False
    """Keep counts, entropies and loads of the experts, and serve routing traces."""
    seed: int = 0
    """For dummy weights, and for requests that bring no seed of their own."""
    max_num_queued_requests: int = 1024
    """Requests that may wait; one more is refused."""
    step_timeout: float = 300.0
    """Seconds one step may take before the engine counts as hanging."""
