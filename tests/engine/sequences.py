"""Sequences for tests that need no request from outside."""

from __future__ import annotations

from engine.sequence import Sequence
from engine.types import Request, SamplingParams, Steering


def make_sequence(
    token_ids: list[int],
    *,
    salt: str | None = None,
    steering: Steering | None = None,
    prompt_logprobs: int | None = None,
    priority: int = 0,
    arrival: int = 0,
) -> Sequence:
    request = Request(
        request_id=f"r{arrival}",
        prompt_ids=tuple(token_ids),
        params=SamplingParams(prompt_logprobs=prompt_logprobs),
        priority=priority,
        cache_salt=salt,
        steering=steering,
    )
    return Sequence(request, arrival=arrival, seed=0)
