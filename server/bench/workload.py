"""What a server is asked: prompts that suit it, found out by asking it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from server.bench.answer import Failure
from server.bench.client import Client, Endpoint, Target
from server.bench.errors import BenchError
from server.bench.prompts import FIRST_ID, LAST_ID, Dataset, FileDataset, Lengths, RandomDataset, Units
from server.bench.words import WORDS

if TYPE_CHECKING:
    from engine.text import Tokenizer

_WARM_UP_INPUT = 32
"""Tokens of a warm-up prompt beside a file, whose own prompts would be in the server's prefix cache afterwards."""
_WARM_UP_OUTPUT = 16
_PROMPTS_PER_STREAM = 4
_LEAST_PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """One command. `dataset` is random, shared-prefix or a JSONL file."""

    base_url: str
    model: str | None
    api_key: str | None
    endpoint: Endpoint
    dataset: str | Path
    num_prompts: int | None
    """In a run; None: all of a file, else some for each request at once."""
    lengths: Lengths
    concurrencies: tuple[int | None, ...]
    """One run each; None: no limit."""
    request_rate: float | None
    ignore_eos: bool
    seed: int
    goodput: Mapping[str, float]
    """Limits in milliseconds by metric."""
    server_pid: int | None
    tokenizer: str | None


@dataclass(frozen=True, slots=True)
class Workload:
    """Where to send prompts, and which. Those to warm up with are never those that are measured."""

    target: Target
    dataset: Dataset
    warm_up: Dataset

    def num_prompts(self, concurrency: int | None) -> int:
        """How many a run has, unless it is told: all of a file, else four for each request at once, at least 16."""
        if isinstance(self.dataset, FileDataset):
            return len(self.dataset)
        return max(_LEAST_PROMPTS, _PROMPTS_PER_STREAM * (concurrency or _LEAST_PROMPTS))


async def prepare(client: Client, options: ServeOptions, notice: Callable[[str], None]) -> Workload:
    """Find the model and the form of prompts that the server takes, and see it answer one request.

    Random prompts are token ids for completions, unless the server refuses those; `notice` is told then. Raises
    BenchError.
    """
    model = await client.model(options.model)
    target = Target(model=model, endpoint=options.endpoint, ignore_eos=options.ignore_eos)
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    refused = None
    if options.endpoint == "completions" and not isinstance(options.dataset, Path):
        workload = _workload(target, options, await _ids(client, model, tokenizer))
        refused = await _try(client, workload)
        if refused is None:
            return workload
        if refused.kind not in ("HTTP 400", "HTTP 422"):
            raise BenchError(f"the first request failed: {refused.kind}: {refused.message}")
    workload = _workload(target, options, await _words(client, model, tokenizer))
    failure = await _try(client, workload)
    if failure is not None:
        first = refused or failure
        raise BenchError(f"the first request failed: {first.kind}: {first.message}")
    if refused is not None:
        notice(f"prompts are texts, since the server refuses token ids: {refused.message}")
    return workload


async def _try(client: Client, workload: Workload) -> Failure | None:
    (prompt,) = workload.warm_up.take(1)
    outcome = await client.generate(workload.target, prompt)
    return outcome if isinstance(outcome, Failure) else None


def _workload(target: Target, options: ServeOptions, units: Units) -> Workload:
    lengths = options.lengths
    short = replace(lengths, output_len=min(lengths.output_len, _WARM_UP_OUTPUT))
    dataset: Dataset
    if isinstance(options.dataset, Path):
        dataset = FileDataset(options.dataset, chat=options.endpoint == "chat", output_len=lengths.output_len)
        short = replace(short, input_len=_WARM_UP_INPUT)
    else:
        dataset = RandomDataset(units, lengths, f"{options.seed}")
    return Workload(target, dataset, RandomDataset(units, short, f"{options.seed} warm-up"))


async def _ids(client: Client, model: str, tokenizer: Tokenizer | None) -> Units:
    last = await client.highest_id(model) if tokenizer is None else min(LAST_ID, tokenizer.vocab_size - 1)
    return Units([n for n in range(FIRST_ID, last + 1) if tokenizer is None or not tokenizer.is_special(n)])


async def _words(client: Client, model: str, tokenizer: Tokenizer | None) -> Units:
    """Words, and how many tokens each is inside a text, as far as anybody can tell."""

    async def size(word: str) -> int | None:
        if tokenizer is not None:
            return len(tokenizer.encode(f" {word}", add_special_tokens=False))
        return await client.num_tokens(model, f" {word}")

    if await size(WORDS[0]) is None:
        return Units(WORDS)
    return Units(WORDS, [await size(word) or 1 for word in WORDS])


def _tokenizer(name: str) -> Tokenizer:
    from engine.text import Tokenizer
    from weights.reader import resolve

    return Tokenizer.load(resolve(name))
