"""The engine's built grammars: each is built once, and only so many are kept."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from typing import Any

import pytest

from engine.grammar import GrammarError, GrammarSpec, Matcher, store
from engine.grammar.build import build
from engine.grammar.store import MAX_GRAMMARS, GrammarStore
from tests.engine.grammar.texts import ENDS, allowed, byte_vocabulary, matches


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were built, in order."""
    sources: list[str] = []

    def counted(source: str, tokenizer: Any) -> Matcher:
        sources.append(source)
        return build(source, tokenizer)

    monkeypatch.setattr(store, "build", counted)
    return sources


def source(text: str) -> str:
    return GrammarSpec.choice([text]).source()


def test_a_grammar_is_built_once(built: list[str]) -> None:
    grammars = GrammarStore(byte_vocabulary())
    futures = [grammars.get(source("ab")) for _ in range(50)]
    start = futures[0].result(30)
    assert all(future.result(30) is start for future in futures)
    start.copy().consume(ord("a"))
    assert grammars.get(source("ab")).done(), "at once when it is known"
    assert allowed(grammars.get(source("ab")).result()) == {ord("a")}, "at its beginning"
    assert built == [source("ab")]
    assert matches(grammars.get(source("cd")).result(30), "cd")
    assert built == [source("ab"), source("cd")]
    assert grammars.eos_token_ids == {*ENDS}


def test_the_least_recently_used_goes_first(built: list[str]) -> None:
    grammars = GrammarStore(byte_vocabulary())
    wait([grammars.get(source(f"{number}")) for number in range(MAX_GRAMMARS)])
    grammars.get(source("0"))
    grammars.get(source("one more")).result(30)
    assert len(built) == MAX_GRAMMARS + 1
    for number in (0, 2, MAX_GRAMMARS - 1):
        grammars.get(source(f"{number}")).result(30)
    assert len(built) == MAX_GRAMMARS + 1
    grammars.get(source("1")).result(30)
    assert built[-1] == source("1")
    assert len(built) == MAX_GRAMMARS + 2


def test_a_grammar_that_is_none() -> None:
    grammars = GrammarStore(byte_vocabulary())
    for _ in range(2):
        future = grammars.get('other: "a"')
        with pytest.raises(GrammarError, match="no start rule found"):
            future.result(30)
    assert matches(grammars.get(source("ab")).result(30), "ab")


def test_building_does_not_hold_up_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in one thread, in order."""
    go_on = threading.Event()
    threads = set()

    def slow(source: str, tokenizer: Any) -> Matcher:
        threads.add(threading.current_thread())
        assert go_on.wait(30)
        return build(source, tokenizer)

    monkeypatch.setattr(store, "build", slow)
    grammars = GrammarStore(byte_vocabulary())
    futures = [grammars.get(source(text)) for text in "abc"]
    assert not any(future.done() for future in futures)
    go_on.set()
    for text, future in zip("abc", futures, strict=True):
        assert matches(future.result(30), text)
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_a_grammar_that_is_forgotten_is_built_anew(built: list[str]) -> None:
    """What copies learn of a grammar they share, and over a bound none of them can go on."""
    grammars = GrammarStore(byte_vocabulary())
    start = grammars.get(source("ab")).result(30)
    grammars.forget(source("ab"))
    grammars.forget(source("never built"))
    assert grammars.get(source("ab")).result(30) is not start
    assert built == [source("ab"), source("ab")]
