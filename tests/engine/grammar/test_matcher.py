"""One sequence's place in its grammar."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from engine.grammar import GrammarError, GrammarSpec, Matcher
from engine.grammar.build import build
from engine.grammar.matcher import BURST_SECONDS, SECONDS_PER_TOKEN, Budget, TokenBits, num_bytes
from tests.engine.grammar.texts import ENDS, allowed, matches
from tests.tiny_tokenizer import VOCAB_SIZE

if TYPE_CHECKING:
    from llguidance import LLTokenizer

AMBIGUOUS = GrammarSpec.lark('start: s\ns: s s | s s s | "a" | "b" | "ab"')
"""Of n letters there are more than 2 to the power of n readings."""


def at(spec: GrammarSpec, library: LLTokenizer, text: str = "") -> Matcher:
    matcher = build(spec.source(), library)
    for byte in text.encode():
        matcher.consume(byte)
    return matcher


def test_copies_go_their_own_ways(library: LLTokenizer) -> None:
    start = at(GrammarSpec.choice(["ax", "by", "bz"]), library)
    first, second = start.copy(), start.copy()
    first.consume(ord("a"))
    second.consume(ord("b"))
    third = second.copy()
    third.consume(ord("y"))
    assert allowed(start) == {ord("a"), ord("b")}
    assert allowed(first) == {ord("x")}
    assert allowed(second) == {ord("y"), ord("z")}
    assert allowed(third) == {*ENDS}
    assert [matcher.is_complete for matcher in (start, first, second, third)] == [False, False, False, True]
    assert third.end_ids == start.end_ids == ENDS


def test_an_error_of_a_copy_is_its_own(library: LLTokenizer) -> None:
    start = at(GrammarSpec.choice(["ab"]), library)
    broken = start.copy()
    with pytest.raises(GrammarError):
        broken.consume(ord("z"))
    with pytest.raises(GrammarError):
        allowed(broken)
    with pytest.raises(GrammarError):
        broken.consume(ord("a"))
    assert matches(start, "ab")
    assert matches(start.copy(), "ab")


def test_the_end_is_allowed_where_the_text_may_end(library: LLTokenizer) -> None:
    assert allowed(at(GrammarSpec.regex("ab*"), library)) == {ord("a")}
    assert allowed(at(GrammarSpec.regex("ab*"), library, "a")) == {ord("b"), *ENDS}
    assert allowed(at(GrammarSpec.regex("ab?"), library, "ab")) == {*ENDS}
    assert allowed(at(GrammarSpec.choice([""]), library)) == {*ENDS}


def test_no_control_token_is_text(library: LLTokenizer) -> None:
    assert allowed(at(GrammarSpec.regex(r"(?s).*"), library)) == {*range(0x80), *range(0xC2, 0xF5), *ENDS}


def test_half_a_character_is_no_end(library: LLTokenizer) -> None:
    matcher = at(GrammarSpec.regex("é?"), library)
    assert allowed(matcher) == {0xC3, *ENDS}
    matcher.consume(0xC3)
    assert allowed(matcher) == {0xA9}


def test_every_bit_is_written(library: LLTokenizer) -> None:
    """Whatever was there before, and nothing beyond."""
    matcher = at(GrammarSpec.choice(["a"]), library)
    room: TokenBits = np.full(num_bytes(VOCAB_SIZE) + 8, 0xFF, dtype=np.uint8)
    matcher.fill(room[4:-4])
    assert np.flatnonzero(np.unpackbits(room[4:-4], bitorder="little")).tolist() == [ord("a")]
    assert room[:4].tolist() == room[-4:].tolist() == [0xFF] * 4


@pytest.mark.parametrize(("size", "expected"), [(1, 4), (8, 4), (31, 4), (32, 4), (33, 8), (260, 36), (49152, 6144)])
def test_a_row_is_whole_words(size: int, expected: int) -> None:
    assert num_bytes(size) == expected


def follow(matcher: Matcher, tokens: int) -> int:
    """How far a random text of the grammar gets before a GrammarError, up to `tokens`."""
    rng = random.Random(0)
    for position in range(tokens):
        try:
            matcher.consume(rng.choice(sorted(allowed(matcher).difference(ENDS))))
        except GrammarError:
            return position
    return tokens


def test_a_grammar_that_takes_ever_longer_is_given_up(library: LLTokenizer) -> None:
    """It would hold up the whole batch by 0.1 s a token. Without a limit, this test takes half a minute."""
    start = at(AMBIGUOUS, library)
    matcher = start.copy()
    far = follow(matcher, 1000)
    assert 10 < far < 1000
    with pytest.raises(GrammarError, match="too long"):
        allowed(matcher)
    assert follow(start.copy(), 1000) < 5, "who asks for many choices has no more time than who asks for one"
    assert follow(at(AMBIGUOUS, library), 1000) > far / 10, "built anew it has"


def test_time_is_given_by_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matcher whose steps take half of what a token may never runs dry, one whose steps take twice does."""
    now = 0.0
    monkeypatch.setattr("engine.grammar.matcher.time.thread_time", lambda: now)

    class Slow:
        """Takes `seconds` a step."""

        def __init__(self, seconds: float) -> None:
            self._seconds = seconds

        def consume_token(self, _: int) -> bool:
            nonlocal now
            now += self._seconds
            return True

    def steps(seconds: float) -> int:
        matcher = Matcher(Slow(seconds), (), Budget())  # type: ignore[arg-type]
        for step in range(10_000):
            try:
                matcher.consume(0)
            except GrammarError:
                return step
        return 10_000

    assert steps(SECONDS_PER_TOKEN / 2) == 10_000
    assert steps(SECONDS_PER_TOKEN * 2) == pytest.approx(BURST_SECONDS / SECONDS_PER_TOKEN, abs=2)
    assert steps(BURST_SECONDS * 2) == 0


def test_time_that_was_not_taken_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = 0.0, 0.0
    monkeypatch.setattr("engine.grammar.matcher.time.thread_time", lambda: now)

    class Inner:
        def consume_token(self, _: int) -> bool:
            nonlocal now
            now += took
            return True

    matcher = Matcher(Inner(), (), Budget())  # type: ignore[arg-type]
    for _ in range(10_000):
        matcher.consume(0)
    took = 1.1 * BURST_SECONDS
    with pytest.raises(GrammarError):
        matcher.consume(0)
