"""What goes into the engine and what comes out: frozen values that know no tensor, no text encoding and no HTTP."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence id, a stop id, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the caller left
    ERROR = "error"  # the request failed; the event's `error` says why


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled. Ranges are those of the HTTP contract; `validate` raises InvalidRequestError.

    Order of application: repetition, presence and frequency penalties, logit_bias, the request's grammar,
    temperature, top_k, top_p, min_p, draw. Logprobs are of the raw model distribution, before all of these. `stop`,
    `include_stop_str_in_output` and `skip_special_tokens` concern text: the core ignores them, whoever turns ids
    into text (LLM, server) obeys them.
    """

    max_tokens: int | None = 16
    """None: the rest of the context."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    choice: int = 0
    """Which of n choices this sequence is: each has its own random stream of the same seed."""
    logprobs: int | None = None
    """Number of most likely tokens to report beside each sampled one; 0: only the sampled one; None: nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens. Such a request reads no prefix cache."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What a request asks of routing, in the order of application: forbidden experts, top-K, min-p."""

    experts_per_token: int | None = None
    """K of this request; None: the model's."""
    forbidden: tuple[tuple[int | None, tuple[int, ...]], ...] = ()
    """(layer, or None for all layers; expert ids that may not be chosen there)."""
    min_p: float = 0.0
    """A chosen expert less probable than this share of the best one is dropped; 0: off."""

    def digest(self) -> bytes:
        """Identifies the hidden states that this steering leads to; two spellings of one mask may differ."""
        return hashlib.sha256(repr((self.experts_per_token, self.forbidden, self.min_p)).encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to continue. `prompt_ids` is never empty; `cache_salt` keeps its prefix-cache blocks to itself."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Lower is served first; equal priorities in order of arrival."""
    cache_salt: str | None = None
    grammar: str | None = None
    """What the output must match: `GrammarSpec.source()`, checked (engine/grammar)."""
    steering: Steering | None = None
    """None: as the model routes. Its digest is part of the prefix-cache key."""
    trace_routing: bool = False
    """Report the routing of every output token."""
    trace_prompt_routing: bool = False
    """Report the routing of every prompt token too. Such a request reads no prefix cache."""

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether something is reported of every prompt token, so that none may come from the prefix cache."""
        return self.trace_prompt_routing or self.params.prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The raw log probability of one token and the most likely ones, best first, at its position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """Who served one token: for every layer the experts, their weights (parallel lists), and the router's entropy in
    nats.

    A prompt token's routing is that of its own pass. An output token's is that of the pass that produced it, whose
    input was the token before. An expert that was chosen and dropped is not listed.
    """

    expert_ids: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExpertVisits:
    """How much expert work a request took: `num_visits` experts computed, over `num_tokens` tokens and all layers."""

    num_visits: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What one step did for one request. The last event of a request, and only that, has a `finish_reason`.

    `token_ids` holds the new tokens, the end-of-sequence token too. `logprobs` is parallel to it when asked for.
    `prompt_logprobs` comes once, with the first token: one entry a prompt token after the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    routing: tuple[TokenRouting, ...] | None = None
    """Parallel to `token_ids`, when asked for."""
    prompt_routing: tuple[TokenRouting, ...] | None = None
    """One entry a prompt token, once, with the first token, when asked for."""
    expert_visits: ExpertVisits | None = None
    """Of a steered request, since it began; only where routing is recorded."""
    queue_seconds: float | None = None
    """With the first event of a request that was scheduled: how long it had waited for that."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop id that ended the request, when it was not an end-of-sequence id."""
    error: str | None = None
    param: str | None = None
    """The field of the request that the error is the fault of; None: it is the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """The routing of one layer over some traffic. Lists have one entry an expert."""

    assigned: tuple[int, ...]
    """Choices of the router."""
    dispatched: tuple[int, ...]
    """Choices that were computed."""
    dropped: int
    """Choices that were not, for want of capacity or by chance."""
    max_over_mean: float
    """Assignments of the busiest expert over the mean: 1.0 is even."""
    coefficient_of_variation: float
    entropy: float
    """Of the full softmax, mean over tokens, in nats."""
    entropy_share: float
    """The same as a share of ln E."""
    auxiliary_loss: float
    """E * sum_i f_i * P_i: 1.0 is even."""
    mean_probability: tuple[float, ...]
    effective_batch: float
    """Tokens that an expert gets in a step in which it gets any."""
    distinct_experts: float
    """Experts that get a token, mean over steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStats:
    """Routing over some traffic. `tokens` are computed rows: recomputed ones count, padding and cached ones do not."""

    tokens: int
    steps: int
    pooled_auxiliary_loss: float
    """Over all layers together, summed over the K choices: K is even."""
    layers: tuple[LayerRouting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityWhatIf:
    """Assignments that a capacity factor would have made overflow, by layer and expert."""

    capacity_factor: float
    window_steps: int
    window_assigned: int
    window_overflow: tuple[tuple[int, ...], ...]
    """Exact."""
    total_capacity_factor: float
    """The factor that the total is exact for: the largest twentieth, up to 4, that is not above the one asked for."""
    total_assigned: int
    total_overflow: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReport:
    """What `GET /v1/experts` shows."""

    router: str
    num_experts: int
    num_experts_per_tok: int
    capacity_factor: float | None
    simulation: str | None
    window: RoutingStats
    total: RoutingStats
    recomputed_tokens: int
    """Of the total's tokens, those that were computed again after a preemption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot after a step. Counters count since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Free or evictable: what a new request could get."""
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens found."""
    prompt_tokens: int = 0
    """Prompt tokens computed or found in the cache, once a request: recomputation after preemption is not counted."""
    generation_tokens: int = 0
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    num_steps: int = 0
    peak_memory_bytes: int = 0
    """Highest resident memory of the engine process; on a GPU, highest device memory allocated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Where device memory went, in bytes."""

    weights: dict[str, int] = field(default_factory=dict)
    """By kind: embedding, attention, norm, router, expert, lm_head."""
    kv_cache: int = 0
    activations: int = 0
    """Of the largest step."""
    graphs: int = 0
    """Pool of the CUDA graphs."""
    total: int = 0
    """Size of the device's memory."""
    predicted: dict[str, int] = field(default_factory=dict)
    """By the names of `measured`: what `mixserve plan` says."""
    measured: dict[str, int] = field(default_factory=dict)
    """weights, activations, CUDA graphs, CUDA itself and KV cache, as far as the device tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine says of itself."""

    model: str
    model_type: str
    device: str
    dtype: str
    backend: str
    vocab_size: int
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    router: str
    """router_type, or the name of the simulation that replaces it."""
    capacity_factor: float | None
    routing_simulation: str | None
    record_routing: bool
    max_experts_per_tok: int
    """The most experts that a request may ask for."""
    expert_params: int
    """Parameters of one expert over all layers: one more expert a token adds so many active parameters."""
    eos_token_ids: tuple[int, ...]
    total_params: int
    active_params: int
    load_seconds: float
    load_bytes: int
    memory: MemoryUse
    pid: int
