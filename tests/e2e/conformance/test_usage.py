"""API.md: "usage counts real tokens, the end-of-sequence token too, also for aborted and n > 1; logprobs lists leave
that token out; `prompt_tokens_details.cached_tokens` when the prefix cache hit."
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import httpx
import openai

from tests.e2e.conformance.asking import END, MODEL, Ask, forced
from tests.e2e.running import Server


def test_usage_counts_the_end_of_sequence_token_and_logprobs_leave_it_out(ask: Ask) -> None:
    answer = ask.complete(prompt="abcd", extra=forced("xyz"), logprobs=1)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 4, 8)
    assert answer.only.tokens == ["x", "y", "z"]
    chat = ask.chat(extra=forced("xyz"), logprobs=True)
    assert chat.usage.completion_tokens == 4
    assert [entry.token for entry in chat.only.entries] == ["x", "y", "z"]


def test_an_end_at_once_is_one_token(ask: Ask) -> None:
    answer = ask.complete(logit_bias={str(END): 100}, temperature=0, logprobs=1)
    assert (answer.only.text, answer.only.tokens, answer.usage.completion_tokens) == ("", [], 1)


def test_usage_counts_every_choice_and_a_prompt_once(ask: Ask) -> None:
    answer = ask.complete(prompt=["abcd", "ef"], n=3, extra=forced("xyz"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 24)
    assert (ask.chat(n=3, extra=forced("xyz")).usage.completion_tokens) == 12


def test_usage_counts_a_chats_template(ask: Ask) -> None:
    """<|im_start|>user, line end, Hi, <|im_end|>, line end; <|im_start|>assistant, line end."""
    assert ask.chat("Hi", max_tokens=1).usage.prompt_tokens == 1 + 5 + 2 + 1 + 1 + 1 + 10


def test_ignored_ends_are_tokens_like_others(ask: Ask) -> None:
    fields: dict[str, Any] = {
        "logit_bias": {str(END): 100},
        "temperature": 0,
        "max_tokens": 5,
        "extra": {"ignore_eos": True},
    }
    assert ask.complete(**fields).usage.completion_tokens == 5


def test_cached_tokens_when_the_prefix_cache_hit(ask: Ask) -> None:
    salt = {"cache_salt": f"usage {ask.stream}"}
    prompt = "p" * 40
    first, second = (ask.complete(prompt=prompt, max_tokens=1, extra=salt) for _ in range(2))
    assert first.usage.prompt_tokens_details is None
    assert second.num_cached == 32, "two blocks of 16"
    assert second.usage.prompt_tokens == 40
    assert ask.complete(prompt=prompt, max_tokens=1, extra={"cache_salt": f"other {ask.stream}"}).num_cached == 0


def test_aborted_requests_are_counted_where_they_end(client: openai.OpenAI, server: Server) -> None:
    """Nobody gets the usage of an answer that nobody reads: it is in the metrics, and no more is generated."""
    before = server.metric("mixserve_generation_tokens_total")
    with client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=2000, stream=True, extra_body={"ignore_eos": True, "min_tokens": 2000}
    ) as stream:
        assert len(list(islice(stream, 5))) == 5
    server.wait_for_metric("mixserve_num_requests_running", 0, seconds=1)
    generated = server.metric("mixserve_generation_tokens_total") - before
    assert 5 <= generated < 2000
    time.sleep(0.2)
    assert server.metric("mixserve_generation_tokens_total") - before == generated
    assert httpx.get(f"{server.url}/health").status_code == 200
