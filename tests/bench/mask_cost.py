"""What a grammar costs: building it, and for each token its mask, going on by the token, and applying the mask.

python -m tests.bench.mask_cost MODEL [--schemas 100] [--walks 3] [--tokens 200] [--json FILE]

MODEL is a folder with a tokenizer. Random schemas (tests/random_schemas.py) are followed by tokens drawn evenly from
those that are allowed, which leads to rarer places than a model would go to. Masks are applied on the CPU. Times are of
the wall clock, and of the thread's processor time where it works alone: on a busy machine the second says more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.grammar import GrammarSpec, GrammarVocabulary, Matcher
from engine.grammar.build import build
from engine.grammar.matcher import TokenBits, num_bytes
from engine.masks import MaskedRow, fill
from engine.text import Tokenizer
from tests.random_schemas import random_schema

BATCHES = (1, 32)


@dataclass
class Times:
    """Of one kind of work, each by both clocks, in nanoseconds."""

    wall: list[int] = field(default_factory=list)
    processor: list[int] = field(default_factory=list)

    @contextmanager
    def one(self) -> Iterator[None]:
        wall, processor = time.perf_counter_ns(), time.thread_time_ns()
        yield
        self.processor.append(time.thread_time_ns() - processor)
        self.wall.append(time.perf_counter_ns() - wall)


def measure(model: Path, *, schemas: int, walks: int, tokens: int) -> dict[str, object]:
    """All figures in microseconds."""
    vocabulary = _vocabulary(model)
    begin = time.perf_counter_ns()
    library = vocabulary.to_library()
    trie = time.perf_counter_ns() - begin
    builds, steps = Times(), Times()
    seen: list[Matcher] = []
    for seed in range(schemas):
        source = GrammarSpec.json_schema(random_schema(seed).schema).source()
        with builds.one():
            start = build(source, library)
        for walk in range(walks):
            matcher = start.copy()
            _walk(matcher, vocabulary, np.random.default_rng([seed, walk]), tokens, steps)
            seen.append(start.copy() if matcher.is_complete else matcher)
    return {
        "vocabulary": len(vocabulary.pieces),
        "schemas": schemas,
        "load_average": os.getloadavg()[0],
        "vocabulary_us": trie / 1e3,
        "build_us": _summary(builds.wall),
        "build_processor_us": _summary(builds.processor),
        "token_us": _summary(steps.wall),
        "token_processor_us": _summary(steps.processor),
        "step_us": {str(batch): _apply(seen, batch, len(vocabulary.pieces)) for batch in BATCHES},
    }


def _vocabulary(model: Path) -> GrammarVocabulary:
    tokenizer = Tokenizer.load(model)
    known = tokenizer.vocabulary
    return GrammarVocabulary.of(known.pieces, known.special_ids, tokenizer.eos_token_ids, known.size)


def _walk(matcher: Matcher, vocabulary: GrammarVocabulary, rng: np.random.Generator, tokens: int, times: Times) -> None:
    """Follow the grammar to an end, or for so many tokens."""
    bits: TokenBits = np.zeros(num_bytes(len(vocabulary.pieces)), dtype=np.uint8)
    ends = frozenset(vocabulary.eos_token_ids)
    token_id: int | None = None
    for _ in range(tokens):
        with times.one():
            if token_id is not None:
                matcher.consume(token_id)
            matcher.fill(bits)
        token_id = int(rng.choice(np.flatnonzero(np.unpackbits(bits, bitorder="little"))))
        if token_id in ends:
            return


def _apply(matchers: Sequence[Matcher], batch: int, vocab_size: int) -> dict[str, dict[str, float]]:
    """Of a whole step of `batch` rows: putting their masks together, and applying them to the logits."""
    device = torch.device("cpu")
    logits = torch.randn(batch, vocab_size)
    together, applied = Times(), Times()
    for first in range(100):
        rows = [MaskedRow(row, matchers[(first + row) % len(matchers)]) for row in range(batch)]
        with together.one():
            masks, _ = fill(rows, vocab_size=vocab_size, device=device)
        with applied.one():
            masks.apply(logits)
    return {"fill": _summary(together.wall), "apply": _summary(applied.wall)}


def _summary(nanoseconds: Sequence[int]) -> dict[str, float]:
    median, p99, most = np.quantile(nanoseconds, [0.5, 0.99, 1.0]) / 1e3
    return {"count": len(nanoseconds), "median": float(median), "p99": float(p99), "max": float(most)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--walks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.model, schemas=arguments.schemas, walks=arguments.walks, tokens=arguments.tokens)
    print(json.dumps(figures, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
