"""API.md: "UTF-8: a character is sent when it is whole. Text streamed equals text returned."."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conformance.asking import Ask, forced

TEXTS = ["é", "naïve 🎉🎉 日本語", "👩‍👩‍👧‍👦", "\u0000\u007f", "a\u0301\ufeffb", "\U0010ffff", "\r\n\t \u2028"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_character_is_sent_when_it_is_whole(client: openai.OpenAI, text: str) -> None:
    for call in (Ask(client, stream=True).complete, Ask(client, stream=True).chat):
        choice = call(extra=forced(text), max_tokens=60).only
        assert choice.text == text
        assert not any("\ufffd" in piece for piece in choice.pieces)


def test_characters_do_not_wait_for_the_end(ask: Ask) -> None:
    """Each byte is a token. Chunks that come at once may be one."""
    text = "é🎉日" * 30
    choice = ask.complete(extra=forced(text), max_tokens=300).only
    assert choice.text == text
    assert len(choice.pieces) > 10 if ask.stream else len(choice.pieces) == 1


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_streamed_equals_text_returned(client: openai.OpenAI, text: str) -> None:
    for stream in (False, True):
        assert Ask(client, stream=stream).complete(extra=forced(text), max_tokens=60).only.text == text
        assert Ask(client, stream=stream).chat(extra=forced(text), max_tokens=60).only.text == text


@pytest.mark.parametrize("seed", range(8))
def test_broken_characters_come_out_the_same(client: openai.OpenAI, seed: int) -> None:
    """Random bytes: most are no UTF-8."""
    fields: dict[str, Any] = {"seed": seed, "temperature": 2, "max_tokens": 64, "extra": {"ignore_eos": True}}
    whole, streamed = (Ask(client, stream=stream).complete(**fields).only.text for stream in (False, True))
    assert whole == streamed
    assert "\ufffd" in whole


def test_a_character_that_never_becomes_whole_is_a_replacement_character(ask: Ask) -> None:
    choice = ask.complete(extra=forced("a🎉"), max_tokens=3).only
    assert (choice.text, choice.finish_reason) == ("a\ufffd", "length")
