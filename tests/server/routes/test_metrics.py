"""GET /metrics: every name of the contract, and numbers that follow what happens."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from engine.text import Tokenizer
from tests.server.conftest import ANSWER
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(live: Live) -> Samples:
    """(name without prefix, labels but the model's) -> value; every sample of ours has the model's name."""
    response = live.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples: Samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name.startswith("mixserve_"):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == MODEL
                samples[sample.name.removeprefix("mixserve_"), tuple(sorted(labels.items()))] = sample.value
    return samples


def test_engine_numbers(server: Live) -> None:
    samples = scrape(server)
    assert samples["num_requests_running", ()] == 0
    assert samples["num_requests_waiting", ()] == 0
    assert samples["kv_cache_usage_perc", ()] == 0
    assert samples["num_preemptions_total", ()] == 3
    assert samples["prefix_cache_queries_total", ()] == 20
    assert samples["prefix_cache_hits_total", ()] == 10
    assert samples["engine_peak_memory_bytes", ()] == 12345


def test_the_process_is_measured(server: Live) -> None:
    assert "process_resident_memory_bytes" in server.client.get("/metrics").text


def test_requests_are_counted_and_timed(tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode(ANSWER.strip(), add_special_tokens=False)
    with live_server(lambda: FakeEngine(lambda _: answer, step_seconds=0.02), tokenizer) as live:
        live.complete(n=2)
        live.complete(max_tokens=3, stream=False)
        live.complete(stop="from")
        live.post("/v1/completions", {"prompt": ""})
        live.post("/v1/completions", {"prompt": [5] * 300})
        live.client.get("/v1/nothing")
        live.call(lambda: setattr(live.engine, "max_waiting", 0))
        assert live.post("/v1/completions", {"prompt": "Hi"}).headers["retry-after"] == "3"
        samples = scrape(live)
        assert samples["request_success_total", (("finished_reason", "stop"),)] == 3
        assert samples["request_success_total", (("finished_reason", "length"),)] == 1
        assert samples["requests_rejected_total", (("reason", "invalid_request"),)] == 1
        assert samples["requests_rejected_total", (("reason", "context_length_exceeded"),)] == 1
        assert samples["requests_rejected_total", (("reason", "server_overloaded"),)] == 1
        assert samples["requests_aborted_total", ()] == 0
        assert samples["prompt_tokens_total", ()] == 8
        assert samples["generation_tokens_total", ()] == 7 + 7 + 3 + 2
        assert samples["time_to_first_token_seconds_count", ()] == 4
        assert samples["e2e_request_latency_seconds_count", ()] == 4
        assert samples["inter_token_latency_seconds_count", ()] == 6 + 6 + 2 + 1
        mean = samples["inter_token_latency_seconds_sum", ()] / samples["inter_token_latency_seconds_count", ()]
        assert 0.015 < mean < 0.2
        assert samples["e2e_request_latency_seconds_sum", ()] > samples["time_to_first_token_seconds_sum", ()] > 0.07
