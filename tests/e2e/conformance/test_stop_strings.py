"""API.md: "Stop strings: hold back what could still become one, never leak it, flush at the end; no empty chunks but
the role's and the finish's; usage counts tokens up to the cut."
"""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conformance.asking import MODEL, Ask, forced


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("abcabdefg", "abd", "abc"),
        ("abcabdefg", ["x", "fg", "de"], "abcab"),
        ("aaaab", ["aab"], "aa"),
        ("xSTOPy", ["STOP", "TOPy"], "x"),
        ("🎉é!é", "é", "🎉"),
        ("🎉é!é", "!", "🎉é"),
        ("stop", "stop", ""),
    ],
)
def test_a_stop_string_never_leaks(ask: Ask, said: str, stop: Any, text: str) -> None:
    for call in (ask.complete, ask.chat):
        answer = call(extra=forced(said), stop=stop, max_tokens=30)
        assert (answer.only.text, answer.only.finish_reason) == (text, "stop")
        assert answer.usage.completion_tokens == len(text.encode()), "usage counts up to the cut"
        assert all(answer.only.pieces)


def test_what_could_become_a_stop_string_is_held_back(client: openai.OpenAI) -> None:
    """After "ab" it is undecided until "c" comes, or "x". Chunks that come at once may be one."""
    for call in (Ask(client, stream=True).complete, Ask(client, stream=True).chat):
        choice = call(extra=forced("abcabcabx" * 12), stop="abd", max_tokens=200).only
        assert choice.text == "abcabcabx" * 12
        assert all(piece[-1] in "cx" for piece in choice.pieces)
        assert len(choice.pieces) > 5


def test_what_is_held_back_is_flushed_at_the_end(ask: Ask) -> None:
    assert ask.complete(extra=forced("xxab"), stop="abd", max_tokens=30).only.text == "xxab"
    cut = ask.complete(extra=forced("xxabd"), stop="abd", max_tokens=4).only
    assert (cut.text, cut.finish_reason) == ("xxab", "length")


def test_logprobs_stop_where_the_text_does(ask: Ask) -> None:
    choice = ask.complete(extra=forced("abcabdefg"), stop="abd", logprobs=0).only
    assert choice.tokens == ["a", "b", "c"]
    entries = ask.chat(extra=forced("abcabdefg"), stop="abd", logprobs=True).only.entries
    assert [entry.token for entry in entries] == ["a", "b", "c"]


def test_the_stop_string_is_kept_where_that_is_asked(ask: Ask) -> None:
    extra = forced("abcabdefg") | {"include_stop_str_in_output": True}
    answer = ask.complete(extra=extra, stop="abd", max_tokens=30)
    assert (answer.only.text, answer.usage.completion_tokens) == ("abcabd", 6)


def test_min_tokens_lets_an_early_stop_string_pass(ask: Ask) -> None:
    extra = forced("ab.cd.ef") | {"min_tokens": 4}
    assert ask.complete(extra=extra, stop=".", max_tokens=30).only.text == "ab.cd"


def test_no_empty_chunks_but_the_roles_and_the_finishs(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    extra = forced("ab🎉cab🎉d")
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stop="zzz", extra_body=extra
        )
    ]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.content for delta in deltas[1:-1])
    assert not deltas[-1].content
    texts = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="Hi", stream=True, stop="bcd", extra_body=extra)
    ]
    assert all(texts[:-1])
    assert texts[-1] == ""
