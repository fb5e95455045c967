"""Whole answers, for requests that do not stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from starlette.types import Receive

from server.choices import ScoredToken
from server.job import Job
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


async def collect(job: Job, receive: Receive) -> list[Answer]:
    """Every choice of `job`, which is closed at the end. Raises ClientLeftError as soon as the client leaves."""
    try:
        return await until_client_leaves(receive, _collect(job))
    finally:
        job.close()


async def _collect(job: Job) -> list[Answer]:
    texts: list[list[str]] = [[] for _ in job.choices]
    tokens: list[list[ScoredToken]] = [[] for _ in job.choices]
    async for delta in job.deltas():
        texts[delta.index].append(delta.text)
        tokens[delta.index].extend(delta.tokens)
    answers = []
    for choice in job.choices:
        assert choice.finish_reason is not None, "deltas end when every choice has finished"
        answers.append(
            Answer(
                index=choice.index,
                text="".join(texts[choice.index]),
                tokens=tuple(tokens[choice.index]),
                finish_reason=choice.finish_reason,
                mean_logprob=choice.mean_logprob,
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
