"""The routes of routing statistics, and the experts' metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import Live, error_of, live_server
from tests.server.routes.test_metrics import scrape

ROUTES = [("GET", "/v1/experts"), ("GET", "/v1/experts/what_if?capacity_factor=1"), ("POST", "/v1/experts/reset")]


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    """A server of its own: its counters start at 0."""
    with live_server(lambda: FakeEngine(lambda _: [8, 9]), tokenizer) as live:
        yield live


def test_the_report(live: Live) -> None:
    live.complete(prompt=[16, 17], max_tokens=2)  # in layer 0 experts 0, 1 and 1, 2, twice
    report = live.client.get("/v1/experts").json()
    assert report.keys() == {
        *("router", "num_experts", "num_experts_per_tok", "capacity_factor", "simulation"),
        *("window", "total", "recomputed_tokens"),
    }
    assert (report["router"], report["capacity_factor"], report["simulation"]) == ("topk_softmax", None, None)
    assert report["recomputed_tokens"] == 5
    for part in (report["window"], report["total"]):
        assert part.keys() == {"tokens", "steps", "pooled_auxiliary_loss", "layers"}
        assert part["tokens"] == 4
        assert [layer["dispatched"] for layer in part["layers"]] == [[2, 4, 2, 0, 0, 0, 0, 0], [0, 2, 4, 2, 0, 0, 0, 0]]
        assert [layer["dropped"] for layer in part["layers"]] == [1, 2]
        assert [layer["entropy"] for layer in part["layers"]] == [1.0, 2.0]
        assert part["layers"][0].keys() >= {"assigned", "max_over_mean", "auxiliary_loss", "effective_batch"}


def test_what_if(live: Live) -> None:
    answer = live.client.get("/v1/experts/what_if", params={"capacity_factor": "1.27"}).json()
    assert answer.keys() == {"capacity_factor", "window_steps", "window", "total"}
    assert (answer["capacity_factor"], answer["window_steps"]) == (1.27, 3)
    window, total = answer["window"], answer["total"]
    assert (window["exact"], window["capacity_factor"]) == (True, 1.27)
    assert (total["exact"], total["capacity_factor"]) == (False, 1.25)
    same = live.client.get("/v1/experts/what_if", params={"capacity_factor": "1.25"}).json()
    assert same["total"]["exact"] is True
    assert window["by_expert"] == [list(range(8)), [0] * 8]
    assert window["by_layer"] == [28, 0]
    assert (window["assigned"], window["overflow"], window["overflow_share"]) == (100, 28, 0.28)
    assert total["by_layer"] == [64, 8]
    assert (total["assigned"], total["overflow"], total["overflow_share"]) == (400, 72, 0.18)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e999", "x", "", "1,5", "0x1", None])
def test_bad_capacity_factors(server: Live, value: str | None) -> None:
    params = {} if value is None else {"capacity_factor": value}
    error = error_of(server.client.get("/v1/experts/what_if", params=params), 400)
    assert error["param"] == "capacity_factor"
    assert "capacity_factor" in error["message"]


def test_a_reset(live: Live) -> None:
    live.complete()
    assert live.client.get("/v1/experts").json()["total"]["tokens"] > 0
    before = scrape(live)
    response = live.client.post("/v1/experts/reset")
    assert (response.status_code, response.json()) == (200, {"status": "reset"})
    assert live.client.get("/v1/experts").json()["total"]["tokens"] == 0
    after = scrape(live)
    counters = [key for key in before if key[0] in ("expert_tokens_total", "expert_dropped_total")]
    assert len(counters) == 2 * 8 + 2
    assert {key: after[key] for key in counters} == {key: before[key] for key in counters}
    assert live.client.get("/v1/experts/reset").status_code == 405


def test_nothing_is_reported_where_nothing_is_recorded(tokenizer: Tokenizer) -> None:
    info = replace(fake_info(), record_routing=False)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live:
        for method, path in ROUTES:
            assert "does not record routing" in error_of(live.client.request(method, path), 400)["message"]
        assert not any(name.startswith(("expert", "router")) for name, _ in scrape(live))


def test_a_dead_engine(tokenizer: Tokenizer) -> None:
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer) as live:
        live.call(lambda: live.engine.die("secret"))
        for method, path in ROUTES:
            error = error_of(live.client.request(method, path), 500)
            assert error["code"] == "engine_dead"
            assert "secret" not in error["message"]
        start = time.monotonic()
        samples = scrape(live)
        assert time.monotonic() - start < 0.5
        assert not any(name.startswith(("expert", "router")) for name, _ in samples)
        assert ("num_requests_running", ()) in samples


def layers(samples: Any, name: str) -> list[float]:
    return [samples[name, (("layer", str(layer)),)] for layer in range(2)]


def test_metrics(live: Live) -> None:
    assert not any(name.startswith("router") for name, _ in scrape(live)), "no gauge before there is traffic"
    live.complete(prompt=[16, 17], max_tokens=2)
    samples = scrape(live)
    tokens = {labels: value for (name, labels), value in samples.items() if name == "expert_tokens_total"}
    assert len(tokens) == 16
    assert tokens[("expert", "1"), ("layer", "0")] == 4
    assert tokens[("expert", "1"), ("layer", "1")] == 2
    assert sum(tokens.values()) == 16
    assert layers(samples, "expert_dropped_total") == [1, 2]
    assert layers(samples, "expert_load_max_over_mean") == [1.5, 2.5]
    assert layers(samples, "expert_load_cv") == [0.25, 1.25]
    assert layers(samples, "router_entropy") == [1.0, 2.0]
    assert layers(samples, "router_auxiliary_loss") == [1.125, 2.125]
    assert layers(samples, "expert_effective_batch") == [2.5, 3.5]
    assert layers(samples, "expert_distinct") == [3.5, 4.5]


def test_metrics_while_the_engine_is_busy(live: Live) -> None:
    live.complete()
    live.call(live.engine.pause)
    start = time.monotonic()
    samples = scrape(live)
    assert 0.9 < time.monotonic() - start < 2
    assert ("generation_tokens_total", ()) in samples
    assert not any(name.startswith(("expert", "router")) for name, _ in samples)
    live.call(live.engine.resume)
    assert ("expert_tokens_total", (("expert", "0"), ("layer", "0"))) in scrape(live)


def test_the_openapi_page_knows_them(server: Live) -> None:
    page = server.client.get("/openapi.json").json()
    for method, path in ROUTES:
        assert method.lower() in page["paths"][path.partition("?")[0]]
    assert {"ExpertReport", "WhatIf", "RoutingTrace"} <= page["components"]["schemas"].keys()
    for name in ("CompletionRequest", "ChatRequest"):
        properties = page["components"]["schemas"][name]["properties"]
        assert properties["experts_per_token"]["anyOf"][0]["minimum"] == 1
        assert (
            properties["expert_min_p"]["anyOf"][0]["minimum"],
            properties["expert_min_p"]["anyOf"][0]["maximum"],
        ) == (
            0,
            1,
        )
        assert "expert_mask" in properties
