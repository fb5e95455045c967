"""API.md: "finish_reason: stop, length, tool_calls, content_filter, nothing else; null in every chunk before the last.
EOS exactly at the limit is `stop`."
"""

from __future__ import annotations

import pytest

from tests.e2e.conformance.asking import END, Ask, forced


def test_stop_at_the_end_of_the_sequence(ask: Ask) -> None:
    assert ask.complete(extra=forced("ab"), max_tokens=10).only.finish_reason == "stop"
    assert ask.chat(extra=forced("ab")).only.finish_reason == "stop"


def test_stop_at_a_stop_string(ask: Ask) -> None:
    assert ask.complete(extra=forced("abc"), stop="b").only.finish_reason == "stop"
    assert ask.chat(extra=forced("abc"), stop="b").only.finish_reason == "stop"


def test_stop_at_a_stop_id(ask: Ask) -> None:
    choice = ask.complete(extra=forced("abc") | {"stop_token_ids": [ord("b")]}).only
    assert (choice.text, choice.finish_reason) == ("a", "stop")


def test_length(ask: Ask) -> None:
    assert ask.complete(extra=forced("abc"), max_tokens=2).only.finish_reason == "length"
    assert ask.chat(extra=forced("abc"), max_tokens=2).only.finish_reason == "length"


@pytest.mark.parametrize("limit", [1, 4])
def test_the_end_of_the_sequence_exactly_at_the_limit_is_stop(ask: Ask, limit: int) -> None:
    text = "abc"[: limit - 1]
    if text:
        answer = ask.complete(extra=forced(text), max_tokens=limit)
    else:
        answer = ask.complete(logit_bias={str(END): 100}, max_tokens=1, temperature=0)
    assert (answer.only.text, answer.only.finish_reason) == (text, "stop")
    assert answer.usage.completion_tokens == limit
    if text:
        assert ask.complete(extra=forced(text), max_tokens=limit - 1).only.finish_reason == "length"


def test_the_end_of_the_context_is_length(ask: Ask) -> None:
    answer = ask.chat("x" * 1990, extra={"ignore_eos": True}, max_completion_tokens=None)
    assert answer.only.finish_reason == "length"
    assert answer.usage.total_tokens == 2048
