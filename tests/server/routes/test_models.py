"""GET /v1/models."""

from __future__ import annotations

import time

import pytest

from tests.server.harness import MODEL, Live


def test_the_served_model(server: Live) -> None:
    body = server.client.get("/v1/models").json()
    assert body.keys() == {"object", "data"}
    (card,) = body["data"]
    assert card["id"] == MODEL
    assert (card["object"], card["owned_by"], card["max_model_len"]) == ("model", "mixserve", 256)
    assert abs(card["created"] - time.time()) < 600
    assert server.client.get(f"/v1/models/{MODEL}").json() == card, "an id may have slashes"
    assert server.client.get(f"/v1/models/{MODEL.replace('/', '%2F')}").json() == card


@pytest.mark.parametrize("name", ["other", "org", "..%2F..%2Fx", "org/fake-model/x"])
def test_unknown_models(server: Live, name: str) -> None:
    response = server.client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
