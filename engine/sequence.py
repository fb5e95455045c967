"""Sequence: one request's state inside the core. Plain Python, no tensors."""

from __future__ import annotations

import sys
import time
from enum import Enum, auto

from engine.grammar.matcher import Matcher
from engine.types import FinishReason, Request, TokenLogprobs, TokenRouting


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt, what was generated so far, and how much of both is in the KV cache.

    Positions [0, num_computed) are in the cache, or will be once the step under way is done, in the blocks of
    `block_table`: position p lies in slot p % block_size of block block_table[p // block_size]. Tokens [num_computed,
    num_tokens) are still to be computed: one for a running decode, more for a prompt, and all of them again after a
    preemption.

    Tokens at the end may be pending: a step under way samples them, and they are not in `token_ids` yet.
    """

    __slots__ = (
        "added_at",
        "admitted",
        "arrival",
        "block_hashes",
        "block_table",
        "finish_reason",
        "matcher",
        "max_num_tokens",
        "num_cached",
        "num_computed",
        "num_ever_computed",
        "num_pending",
        "num_prompt",
        "num_visited_tokens",
        "num_visits",
        "prompt_logprobs",
        "prompt_routing",
        "queue_seconds",
        "request",
        "seed",
        "status",
        "token_ids",
    )

    def __init__(self, request: Request, *, arrival: int, seed: int, max_model_len: int = sys.maxsize) -> None:
        self.request = request
        self.arrival = arrival
        self.seed = seed
        self.added_at = time.monotonic()
        self.queue_seconds: float | None = None
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        max_tokens = request.params.max_tokens
        self.max_num_tokens = max_model_len if max_tokens is None else min(max_model_len, self.num_prompt + max_tokens)
        self.num_computed = 0
        self.num_pending = 0
        self.num_ever_computed = 0
        self.num_visits = 0
        self.num_visited_tokens = 0
        self.num_cached = 0
        self.admitted = False
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_routing: list[TokenRouting] = []
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.matcher: Matcher | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority value, then earlier arrival."""
        return self.request.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """A pending one included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        """Tokens that were generated and are known."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens that must be computed before the next one can be sampled; 0 when a pending one is the last."""
        if self.num_pending and self.num_tokens >= self.max_num_tokens:
            return 0
        return self.num_tokens - self.num_computed

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}, {self.num_computed}/{self.num_tokens} computed, {self.status.name})"
        )
