"""API.md: "n > 1: index = prompt_index * n + i; allowed at temperature 0; each choice has its own seed stream."."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conformance.asking import Ask


def test_index_is_prompt_times_n_plus_i(ask: Ask) -> None:
    prompts = [[97, 97], [98, 98], [99, 99]]
    answer = ask.complete(prompt=prompts, n=2, echo=True, max_tokens=3)
    assert [choice.text[:2] for choice in answer.choices] == ["aa", "aa", "bb", "bb", "cc", "cc"]
    assert answer.usage.prompt_tokens == 6, "a prompt counts once"
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": 0, "extra": {"ignore_eos": True}}
    alone = [ask.complete(prompt=prompt, **fields).only.tokens for prompt in prompts]
    assert alone[0] != alone[1] != alone[2]
    together = ask.complete(prompt=prompts, n=2, **fields).choices
    assert [choice.tokens for choice in together] == [tokens for tokens in alone for _ in range(2)]


def test_n_is_allowed_at_temperature_0(ask: Ask) -> None:
    texts = [choice.text for choice in ask.complete(n=3, temperature=0, max_tokens=8).choices]
    assert len(texts) == 3
    assert len(set(texts)) == 1
    assert len({choice.text for choice in ask.chat(n=3, temperature=0, max_tokens=8).choices}) == 1


def test_each_choice_has_its_own_seed_stream(ask: Ask) -> None:
    """Tokens, not text: two broken characters look alike."""

    def tokens(n: int) -> list[list[str]]:
        answer = ask.complete(n=n, temperature=1, seed=7, max_tokens=12, logprobs=0, extra={"ignore_eos": True})
        return [choice.tokens for choice in answer.choices]

    four = tokens(4)
    assert len({*map(tuple, four)}) == 4
    assert tokens(4) == four
    assert tokens(2) == four[:2], "a choice does not depend on how many there are"
    assert tokens(1) == four[:1]


def test_at_most_128_choices(ask: Ask) -> None:
    assert len(ask.complete(prompt=["a"] * 64, n=2, max_tokens=1).choices) == 128
    for fields in ({"prompt": ["a"] * 65, "n": 2}, {"n": 129}, {"prompt": ["a"] * 129}):
        with pytest.raises(openai.BadRequestError):
            ask.complete(**fields, max_tokens=1)


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    ask = Ask(client, stream=False)
    fields: dict[str, Any] = {"seed": 5, "max_tokens": 6, "logprobs": 0, "extra": {"ignore_eos": True}}
    every = ask.complete(n=8, **fields).choices
    best = ask.complete(n=2, best_of=8, **fields)
    means = sorted((sum(score or 0 for score in choice.token_logprobs) for choice in every), reverse=True)
    found = [sum(score or 0 for score in choice.token_logprobs) for choice in best.choices]
    assert found == pytest.approx(means[:2], abs=1e-4)
    assert best.usage.completion_tokens == 48, "all that was generated"


def test_best_of_over_n_cannot_be_streamed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        Ask(client, stream=True).complete(n=1, best_of=2)
    assert caught.value.param == "best_of"
    Ask(client, stream=True).complete(n=2, best_of=2, max_tokens=2)
