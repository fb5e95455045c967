"""An event of GET /v1/experts/events: what the server is doing in this second."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class HealthNow(TypedDict):
    """`busy`: the engine has not answered in time, and `routing` is of an earlier moment. `silent`: no heartbeat."""

    status: Literal["ok", "busy", "silent", "dead", "shutting_down"]
    message: str | None
    """One line; null when all is well."""


class ModelFacts(TypedDict):
    """What does not change while the server runs."""

    id: str
    model_type: str
    device: str
    dtype: str
    backend: str
    chat: bool
    """Whether it has a chat template."""
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    max_experts_per_tok: int
    """The most that a request's `experts_per_token` may be."""
    total_params: int
    active_params: int
    """For a token, as the model routes."""
    expert_params: int
    """Of one expert over all layers: what one more expert a token adds to the active parameters."""
    max_model_len: int
    max_num_seqs: int
    router: str
    capacity_factor: float | None
    routing_simulation: str | None
    record_routing: bool
    enable_prefix_caching: bool


class EngineNow(TypedDict):
    """Counters count since the engine started."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share in use."""
    prefix_cache_queries: int
    prefix_cache_hits: int
    prefix_cache_hit_rate: float | None
    """Null before any prompt was looked up."""
    num_preemptions: int
    recomputed_tokens: int
    num_steps: int
    prompt_tokens: int
    generation_tokens: int


class Throughput(TypedDict):
    """Over the last seconds."""

    seconds: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float


class Percentiles(TypedDict):
    """In seconds, of `count` times."""

    count: int
    p50: float
    p90: float
    p99: float


class Latency(TypedDict):
    """Over the last `seconds`; null where nothing was timed."""

    seconds: int
    time_to_first_token: Percentiles | None
    inter_token: Percentiles | None


class MemoryNow(TypedDict):
    """In bytes."""

    weights: dict[str, int]
    """By kind."""
    kv_cache: int
    activations: int
    total: int
    """Of the device."""
    peak: int
    """The highest use so far."""


class RoutingShare(TypedDict):
    """Routing over some traffic. Lists have one entry a layer; four decimals."""

    tokens: int
    steps: int
    share: list[list[float]]
    """By layer and expert: share of the layer's choices; 1 / E is even."""
    dropped: list[list[int]]
    """By layer and expert: choices that were not computed."""
    drop_share: list[float]
    """Dropped choices over all choices."""
    entropy: list[float]
    """Of the router's distribution, mean over tokens, in nats."""
    entropy_share: list[float]
    """The same over ln E."""
    imbalance: list[float]
    """Choices of the busiest expert over the mean; 1 is even."""
    effective_batch: list[float]
    distinct_experts: list[float]


class RoutingNow(TypedDict):
    recomputed_tokens: int
    window: RoutingShare
    """Over the latest steps."""
    total: RoutingShare
    """Since the start or the last reset."""


class LiveEvent(TypedDict):
    time: float
    """Seconds since 1970."""
    health: HealthNow
    model: ModelFacts
    engine: EngineNow
    throughput: Throughput | None
    """Null in a first event, which has nothing to compare with."""
    latency: Latency
    memory: MemoryNow
    routing: RoutingNow | None
    """Null when routing is not recorded, and before the engine has answered for the first time."""
