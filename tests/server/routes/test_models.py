"""GET /v1/models."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, live_server


def test_the_served_model(server: Live) -> None:
    body = server.client.get("/v1/models").json()
    assert body.keys() == {"object", "data"}
    (card,) = body["data"]
    assert card.keys() == {"id", "object", "created", "owned_by", "max_model_len"}
    assert card["id"] == MODEL
    assert (card["object"], card["owned_by"], card["max_model_len"]) == ("model", "mixserve", 256)
    assert abs(card["created"] - time.time()) < 600
    assert server.client.get(f"/v1/models/{MODEL}").json() == card, "an id may have slashes"
    assert server.client.get(f"/v1/models/{MODEL.replace('/', '%2F')}").json() == card


def test_simulated_routing_is_told(tokenizer: Tokenizer) -> None:
    info = replace(fake_info(), router="zipf", routing_simulation="zipf")
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live:
        (card,) = live.client.get("/v1/models").json()["data"]
    assert card["routing_simulation"] == "zipf"


@pytest.mark.parametrize("name", ["other", "org", "..%2F..%2Fx", "org/fake-model/x"])
def test_unknown_models(server: Live, name: str) -> None:
    response = server.client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
