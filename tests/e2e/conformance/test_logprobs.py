"""API.md: "logprobs. Completions: tokens, token_logprobs, top_logprobs, text_offset. Chat: content[] of token, logprob,
bytes, top_logprobs. `bytes` are the vocabulary's own bytes, so a character split over tokens is right."
"""

from __future__ import annotations

import math

import pytest

from tests.e2e.conformance.asking import Ask, forced

TEXT = "aé🎉z"
"""Eight byte tokens."""


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_completions_have_four_parallel_lists(ask: Ask, num_top: int) -> None:
    choice = ask.complete(logprobs=num_top, max_tokens=7, seed=3, extra={"ignore_eos": True}).only
    assert len(choice.tokens) == len(choice.token_logprobs) == len(choice.top_logprobs) == len(choice.text_offset) == 7
    for token, score, top in zip(choice.tokens, choice.token_logprobs, choice.top_logprobs, strict=True):
        assert score is not None
        assert top is not None
        assert top[token] == score
        assert len(top) in (num_top, num_top + 1), "the likeliest, and the token itself where it is not one"
        likeliest = sorted(top.values(), reverse=True)[:num_top]
        assert sum(map(math.exp, likeliest)) <= 1.0001
        assert all(score <= value for value in likeliest) or score in likeliest


def test_without_logprobs_there_are_none(ask: Ask) -> None:
    assert not ask.complete().only.has_logprobs
    assert not ask.chat(max_tokens=3).only.has_logprobs
    assert not ask.chat(max_tokens=3, logprobs=False).only.has_logprobs


def test_text_offsets_tell_where_each_token_begins(ask: Ask) -> None:
    choice = ask.complete(extra=forced(TEXT), logprobs=0).only
    assert choice.text == TEXT
    assert choice.text_offset == [0, 1, 1, 2, 2, 2, 2, 3]
    assert choice.tokens[0] == "a"
    assert choice.tokens[1:3] == ["bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_chat_has_content_with_bytes(ask: Ask, num_top: int) -> None:
    choice = ask.chat(extra=forced(TEXT), logprobs=True, top_logprobs=num_top).only
    assert choice.text == TEXT
    assert [entry.bytes for entry in choice.entries] == [[byte] for byte in TEXT.encode()]
    assert all(len(entry.top_logprobs) == num_top for entry in choice.entries)
    assert all(entry.logprob <= 0 for entry in choice.entries)


def test_bytes_of_a_split_character_make_it_whole(ask: Ask) -> None:
    choice = ask.chat(extra=forced("🎉"), logprobs=True).only
    assert bytes(byte for entry in choice.entries for byte in entry.bytes or ()).decode() == choice.text == "🎉"
    assert [entry.token for entry in choice.entries] == [f"bytes:\\x{byte:02x}" for byte in "🎉".encode()]


def test_log_probabilities_are_of_the_model_before_bias_and_temperature(ask: Ask) -> None:
    plain = ask.complete(prompt="abc", max_tokens=1, temperature=0, logprobs=20).only
    cold = ask.complete(prompt="abc", max_tokens=1, temperature=0.01, top_p=0.01, logprobs=20).only
    biased = ask.complete(prompt="abc", max_tokens=1, temperature=0, logprobs=20, logit_bias={"97": 100}).only
    assert biased.text == "a"
    assert plain.top_logprobs[0] == cold.top_logprobs[0]
    assert plain.top_logprobs[0] is not None
    assert biased.top_logprobs[0] is not None
    assert plain.top_logprobs[0].items() <= biased.top_logprobs[0].items()
