"""Apps side by side."""

from __future__ import annotations

from engine.text import Tokenizer
from server.config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.harness import live_server


def test_two_apps_share_nothing(tokenizer: Tokenizer) -> None:
    configs = [ServerConfig(served_model_name=name) for name in ("one", "two")]
    with (
        live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, configs[0]) as one,
        live_server(lambda: FakeEngine(lambda _: [6]), tokenizer, configs[1]) as two,
    ):
        assert one.complete()["model"] == "one"
        assert two.complete()["model"] == "two"
        one.complete()
        name = 'mixserve_request_success_total{finished_reason="stop",model_name="%s"} %.1f'
        assert name % ("one", 2) in one.client.get("/metrics").text
        assert name % ("two", 1) in two.client.get("/metrics").text
