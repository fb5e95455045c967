"""The app as a whole: its OpenAPI page, and apps side by side."""

from __future__ import annotations

from typing import Any

from engine.text import Tokenizer
from server.config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Live, live_server


def openapi(server: Live) -> dict[str, Any]:
    page: dict[str, Any] = server.client.get("/openapi.json").json()
    return page


def test_every_route_documents_the_error_object_and_no_422(server: Live) -> None:
    paths = openapi(server)["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= paths.keys()
    for path in paths.values():
        for operation in path.values():
            assert operation["responses"].keys() == {"200", "4XX", "5XX"}
            for status in ("4XX", "5XX"):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_parameters_document_their_intervals(server: Live) -> None:
    schemas = openapi(server)["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        properties = schemas[name]["properties"]
        number = properties["temperature"]["anyOf"][0]
        assert (number["minimum"], number["maximum"]) == (0, 2)
        number = properties["top_p"]["anyOf"][0]
        assert (number["exclusiveMinimum"], number["maximum"]) == (0, 1)
        assert properties["logit_bias"]["anyOf"][0]["maxProperties"] == 300
    assert schemas["CompletionRequest"]["required"] == ["prompt"]
    assert schemas["ChatRequest"]["required"] == ["messages"]


def test_no_page_loads_anything_from_elsewhere(server: Live) -> None:
    for path in ("/docs", "/redoc"):
        assert server.client.get(path).status_code == 404


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
