"""Whole answers, for requests that do not stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from starlette.types import Receive

from server.choices import ChoiceDelta, ScoredToken
from server.job import Job
from server.protocol.routing import RoutingTrace
from server.routing import trace
from server.stream import until_client_leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished choice."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: Literal["stop", "length"]
    mean_logprob: float
    """Over the generated tokens; 0 when none was scored."""
    routing: RoutingTrace
    """With the lists that were asked for."""


async def collect(job: Job, receive: Receive) -> list[Answer]:
    """Every choice of `job`, which is closed at the end. Raises ClientLeftError as soon as the client leaves."""
    try:
        return await until_client_leaves(receive, _collect(job))
    finally:
        job.close()


async def _collect(job: Job) -> list[Answer]:
    deltas: list[list[ChoiceDelta]] = [[] for _ in job.choices]
    async for delta in job.deltas():
        deltas[delta.index].append(delta)
    asks_prompt, asks_tokens = job.spec.trace_prompt_routing, job.spec.trace_routing
    answers = []
    for choice, own in zip(job.choices, deltas, strict=True):
        assert choice.finish_reason is not None, "deltas end when every choice has finished"
        answers.append(
            Answer(
                index=choice.index,
                text="".join(delta.text for delta in own),
                tokens=tuple(chain.from_iterable(delta.tokens for delta in own)),
                finish_reason=choice.finish_reason,
                mean_logprob=choice.mean_logprob,
                routing=trace(
                    prompt=chain.from_iterable(delta.prompt_routing or () for delta in own) if asks_prompt else None,
                    tokens=chain.from_iterable(delta.routing for delta in own) if asks_tokens else None,
                ),
            )
        )
    return answers


def best_of(answers: Sequence[Answer], num_generated: int, num_returned: int) -> list[Answer]:
    """Of each `num_generated` answers to one prompt, the `num_returned` with the highest mean log probability.

    Where all are returned there is nothing to choose, and each keeps its index: the one that it has in a stream.
    """
    if num_generated == num_returned:
        return list(answers)
    best: list[Answer] = []
    for start in range(0, len(answers), num_generated):
        ranked = sorted(answers[start : start + num_generated], key=lambda answer: -answer.mean_logprob)
        best += ranked[:num_returned]
    return [replace(answer, index=index) for index, answer in enumerate(best)]
