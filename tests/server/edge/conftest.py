"""A server with keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

KEY, OTHER_KEY = "sk-first-0123456789", "sk-second-0123456789"


@pytest.fixture(scope="package")
def locked(tokenizer: Tokenizer) -> Iterator[Live]:
    """Its answers are a few tokens, at once."""
    edge = EdgeConfig(api_keys=(ApiKey.of(OTHER_KEY), ApiKey.of(KEY)))
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    with live_server(lambda: FakeEngine(lambda _: [5, 6]), tokenizer, config) as live:
        yield live


def metric(live: Live, series: str, *, key: str = "none") -> float:
    """The value of a series, named with its labels; 0 when there is none."""
    text = live.client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
    lines = [line for line in text.splitlines() if line.startswith(f"mixserve_{series} ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0
