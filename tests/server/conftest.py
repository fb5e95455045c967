"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.harness import GoodStreams, Live, live_server

MIXTRAL = Path(__file__).parent.parent / "golden" / "mixtral-8x7b"
ANSWER = " Hello from the fake engine."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Mixtral's own."""
    return Tokenizer.load(MIXTRAL)


@pytest.fixture(scope="module")
def module_server(tokenizer: Tokenizer) -> Iterator[Live]:
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer) as live:
        yield live


@pytest.fixture
def server(module_server: Live, tokenizer: Tokenizer) -> Live:
    """A server whose engine answers ANSWER, without log of what came before."""
    answer = tokenizer.encode(ANSWER.strip(), add_special_tokens=False)

    def reset() -> None:
        engine = module_server.engine
        engine.script = lambda _: answer
        engine.step_seconds, engine.fail_at, engine.num_cached_tokens, engine.silent = 0.0, None, 0, False
        engine.requests.clear()
        engine.aborted.clear()
        engine.routed.clear()

    module_server.call(reset)
    return module_server


@pytest.fixture(scope="module")
def busy_server(tokenizer: Tokenizer) -> Iterator[Live]:
    """A server with four good streams beside whatever the tests of a module do to it; their text must not change."""
    answer = tokenizer.encode(ANSWER.strip(), add_special_tokens=False)
    with live_server(lambda: FakeEngine(lambda _: answer, step_seconds=0.005), tokenizer) as live:
        good = GoodStreams(live)
        try:
            yield live
        finally:
            good.stop()
        assert good.errors == []
        assert len(good.texts) > 4
        assert set(good.texts) == {ANSWER}
