"""Scored tokens in OpenAI's shapes: names of tokens that are no text, and values that are no JSON."""

from __future__ import annotations

import json
import math

from engine.text import Tokenizer
from server.choices import ScoredToken
from server.json_io import dump
from server.logprobs import chat_logprobs, completion_logprobs, token_name

BYTE_F0 = 3 + 0xF0  # Mixtral's byte tokens follow its three control tokens


def test_names(tokenizer: Tokenizer) -> None:
    (hello,) = tokenizer.encode("Hello", add_special_tokens=False)
    assert token_name(tokenizer, hello) == " Hello"
    assert token_name(tokenizer, 1) == "<s>"
    assert token_name(tokenizer, BYTE_F0) == "bytes:\\xf0"
    assert token_name(tokenizer, BYTE_F0 + 1) != token_name(tokenizer, BYTE_F0)


def test_bytes_are_the_vocabularys_and_control_has_none(tokenizer: Tokenizer) -> None:
    tokens = [ScoredToken(token_id, -1.0, (), 0) for token_id in (BYTE_F0, 1)]
    content = chat_logprobs(tokenizer, tokens, 0)["content"]
    assert [entry["bytes"] for entry in content] == [[0xF0], None]


def test_no_chance_is_a_large_negative_number(tokenizer: Tokenizer) -> None:
    token = ScoredToken(1, -math.inf, ((5, -math.inf), (6, -1.0)), 0)
    chat = json.loads(dump(chat_logprobs(tokenizer, [token], 2)))
    assert chat["content"][0]["logprob"] == -9999.0
    assert chat["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    completion = json.loads(dump(completion_logprobs(tokenizer, [token], 2)))
    assert completion["token_logprobs"] == [-9999.0]
    assert sorted(completion["top_logprobs"][0].values()) == [-9999.0, -9999.0, -1.0]


def test_the_sampled_token_is_always_among_the_likeliest_of_a_completion(tokenizer: Tokenizer) -> None:
    token = ScoredToken(100, -7.0, ((200, -0.1), (300, -0.2)), 4)
    for num_top, expected in ((0, 1), (1, 2), (2, 3)):
        found = completion_logprobs(tokenizer, [token], num_top)
        assert found["top_logprobs"][0] is not None
        assert len(found["top_logprobs"][0]) == expected
        assert found["top_logprobs"][0][found["tokens"][0]] == -7.0
        assert found["text_offset"] == [4]


def test_of_two_tokens_with_one_name_the_likelier_is_kept(tokenizer: Tokenizer) -> None:
    capital_a = next(
        token_id
        for token_id in range(259, tokenizer.vocab_size)
        if tokenizer.token_bytes(token_id) == b"A" and token_id != 3 + 0x41
    )
    token = ScoredToken(5, -3.0, ((capital_a, -0.5), (3 + 0x41, -0.9)), 0)
    top = completion_logprobs(tokenizer, [token], 2)["top_logprobs"][0]
    assert top is not None
    assert top["A"] == -0.5
