"""Prompts scored over HTTP (echo with logprobs) have transformers' log probabilities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import MixtralForCausalLM

from engine.text import Tokenizer
from tests.e2e.random_requests import token_bytes
from tests.e2e.running import Server

TOLERANCE = 1e-3
WORDS = (
    "The",
    " capital",
    " of",
    " France",
    " is",
    " 42",
    "\n\n",
    " é",
    "漢字",
    "🎉",
    " x = [1, 2]",
    "  ",
    ".",
    "...",
    "ing",
)
Prompt = str | list[int]


class Reference:
    """Log probabilities by transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self._model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def scores(self, prompts: Sequence[list[int]]) -> list[Tensor]:
        """Log probabilities [len(ids), V] of what follows each token."""
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(prompts):
            by_length.setdefault(len(ids), []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_length.values():  # together those that need no padding
            with torch.inference_mode():
                logits = self._model(torch.tensor([prompts[number] for number in numbers])).logits
                found |= zip(numbers, torch.log_softmax(logits, -1), strict=True)
        return [found[number] for number in range(len(prompts))]


@dataclass(frozen=True)
class Batch:
    """One request."""

    prompts: list[Prompt]
    num_top: int
    max_tokens: int


def draw_batches(rng: random.Random, *, count: int, size: int, longest: int, vocab_size: int) -> list[Batch]:
    """`count` requests of `size` prompts of 1 to about `longest` tokens, all of text or all of ids."""
    batches = []
    for number in range(count):
        lengths = [rng.choice([1, 2, longest, rng.randint(1, longest)]) for _ in range(size)]
        prompts: list[Prompt]
        if number % 2:
            prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
        else:
            prompts = ["".join(rng.choices(WORDS, k=max(1, length // 3))) for length in lengths]
        batches.append(Batch(prompts, num_top=rng.choice([0, 1, 5, 20]), max_tokens=number // 2 % 2))
    return batches


def check_batches(client: httpx.Client, reference: Reference, batches: Sequence[Batch], *, at_once: int) -> int:
    """Score the prompts of all requests, `at_once` of these at a time; how many log probabilities were compared."""
    all_ids = [[reference.ids(prompt) for prompt in batch.prompts] for batch in batches]
    expected = iter(reference.scores([ids for some in all_ids for ids in some]))
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda batch: score(client, batch), batches))
    for batch, some, answer in zip(batches, all_ids, answers, strict=True):
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(batch.prompts)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, some))
        for choice, ids in zip(answer["choices"], some, strict=True):
            check_choice(reference, choice, ids, next(expected), batch)
    return sum(len(ids) - 1 for some in all_ids for ids in some)


def score(client: httpx.Client, batch: Batch) -> dict[str, Any]:
    prompt: Any = batch.prompts if len(batch.prompts) > 1 else batch.prompts[0]
    body = {"prompt": prompt, "echo": True, "logprobs": batch.num_top, "max_tokens": batch.max_tokens, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check_choice(reference: Reference, choice: dict[str, Any], ids: list[int], scores: Tensor, batch: Batch) -> None:
    logprobs = choice["logprobs"]
    tokens, values, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    assert (values[0], tops[0]) == (None, None)
    data = [reference.tokenizer.token_bytes(token) for token in ids]
    assert [token_bytes(name) for name in tokens[: len(ids)]] == data
    expected = [float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert values[1 : len(ids)] == pytest.approx(expected, abs=TOLERANCE)
    generated = tokens[len(ids) :]  # none when the first generated token ended the sequence
    assert len(generated) <= batch.max_tokens
    if generated:
        best = int(scores[-1].argmax())
        assert token_bytes(generated[0]) == reference.tokenizer.token_bytes(best)
        assert values[-1] == pytest.approx(float(scores[-1, best]), abs=TOLERANCE)
    for at, top in enumerate(tops[1:]):
        likeliest = scores[at].topk(batch.num_top).values.tolist() if batch.num_top else []
        found = sorted(top.values(), reverse=True)
        assert found[: batch.num_top] == pytest.approx(likeliest, abs=TOLERANCE)
        assert len(found) in (batch.num_top, batch.num_top + 1), "the token itself, where it is none of them"
        assert values[at + 1] in found


def test_four_hundred_prompts_to_the_tiny_model(tiny_server: Server, tiny_checkpoint: Path) -> None:
    """Four requests of ten prompts at once, so that steps mix them and cut them into chunks."""
    reference = Reference(tiny_checkpoint)
    batches = draw_batches(random.Random(1), count=40, size=10, longest=200, vocab_size=260)
    with httpx.Client(base_url=tiny_server.url, timeout=120) as client:
        assert check_batches(client, reference, batches, at_once=4) > 20_000


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["x", "The capital of France", [7], [5, 259, 0, 41]], ids=str)
def test_one_prompt(tiny_server: Server, tiny_checkpoint: Path, prompt: Prompt, max_tokens: int) -> None:
    """Not in a list."""
    with httpx.Client(base_url=tiny_server.url, timeout=120) as client:
        check_batches(client, Reference(tiny_checkpoint), [Batch([prompt], 3, max_tokens)], at_once=1)


@pytest.mark.demo
def test_a_hundred_prompts_to_the_demo_model(demo_server: Server, demo_checkpoint: Path) -> None:
    reference = Reference(demo_checkpoint)
    batches = draw_batches(random.Random(2), count=10, size=10, longest=24, vocab_size=49152)
    with httpx.Client(base_url=demo_server.url, timeout=300) as client:
        assert check_batches(client, reference, batches, at_once=2) > 500
