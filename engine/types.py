"""What goes into the engine and what comes out: frozen values that know no tensor, no text encoding and no HTTP."""

from __future__ import annotations

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

    Order of application: repetition, presence and frequency penalties, logit_bias, temperature, top_k, top_p, min_p,
    draw. Logprobs are of the raw model distribution, before all of these. `stop`, `include_stop_str_in_output` and
    `skip_special_tokens` concern text: the core ignores them, whoever turns ids into text (LLM, server) obeys them.
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
class Request:
    """One sequence to continue. `prompt_ids` is never empty; `cache_salt` keeps its prefix-cache blocks to itself."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Lower is served first; equal priorities in order of arrival."""
    cache_salt: str | None = None
    steering_digest: bytes = b""
    """Identifies whatever changes this request's hidden states beside its tokens; empty for a plain request."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The raw log probability of one token and the most likely ones, best first, at its position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()


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
    queue_seconds: float | None = None
    """With the first event of a request that was scheduled: how long it had waited for that."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop id that ended the request, when it was not an end-of-sequence id."""
    error: str | None = None


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
    total: int = 0
    """Size of the device's memory."""


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
    eos_token_ids: tuple[int, ...]
    total_params: int
    active_params: int
    load_seconds: float
    load_bytes: int
    memory: MemoryUse
    pid: int
