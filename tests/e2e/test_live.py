"""What the page at / relies on, with a real engine: events that add up, and tokens with their routing in a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx2

from tests.e2e.running import Server

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(server: Server, **body: Any) -> tuple[list[Any], list[Any], str, Any]:
    """Logprobs entries, routing entries, text and usage of a stream."""
    scored: list[Any] = []
    routed: list[Any] = []
    text = ""
    usage = None
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "routing": True} | body
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                break
            chunk = json.loads(event.data)
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
                scored += (choice["logprobs"] or {"content": []})["content"]
                routed += choice.get("routing", {"tokens": []})["tokens"]
    return scored, routed, text, usage


def test_entry_i_of_logprobs_and_routing_is_token_i(tiny_server: Server) -> None:
    for seed in range(8):
        scored, routed, text, usage = chat(tiny_server, logprobs=True, max_tokens=40, seed=seed, temperature=1)
        assert len(routed) == usage["completion_tokens"]
        assert len(routed) - len(scored) in (0, 1), "the end-of-sequence token has routing alone"
        data = b"".join(bytes(token["bytes"]) for token in scored if token["bytes"] is not None)
        assert data.decode(errors="replace").strip() == text.strip()
        whole = httpx2.post(
            f"{tiny_server.url}/v1/chat/completions",
            json={"messages": MESSAGES, "routing": True, "max_tokens": 40, "seed": seed, "temperature": 1},
        ).json()
        assert whole["choices"][0]["routing"]["tokens"] == routed


def test_what_steering_costs_is_told(tiny_server: Server) -> None:
    with httpx2.stream("GET", f"{tiny_server.url}/v1/experts/events", timeout=20) as response:
        event = json.loads(next(iter(httpx2.EventSource(response))).data)
    model = event["model"]
    _, routed, _, usage = chat(tiny_server, experts_per_token=1, max_tokens=10)
    assert all(len(layer) == 1 for token in routed for layer in token["experts"])
    saved = (model["num_experts_per_tok"] - 1) * model["expert_params"]
    assert usage["active_params_per_token"] == model["active_params"] - saved
    _, routed, _, usage = chat(tiny_server, max_tokens=10)
    assert "active_params_per_token" not in usage, "then it is the model's"
    most = model["max_experts_per_tok"]
    _, routed, _, _ = chat(tiny_server, experts_per_token=most, max_tokens=10)
    assert {len(layer) for token in routed for layer in token["experts"]} == {most}


def generated(event: Any) -> int:
    count: int = event["engine"]["generation_tokens"]
    return count


def test_events_add_up(tiny_server: Server) -> None:
    with httpx2.stream("GET", f"{tiny_server.url}/v1/experts/events", timeout=20) as response:
        events = (json.loads(event.data) for event in httpx2.EventSource(response))
        before = next(events)
        body = {"prompt": "Hello", "max_tokens": 30, "ignore_eos": True}
        usage = httpx2.post(f"{tiny_server.url}/v1/completions", json=body).json()["usage"]
        after = next(
            event for event in events
            if generated(event) - generated(before) == usage["completion_tokens"]
        )  # fmt: skip
    report = httpx2.get(f"{tiny_server.url}/v1/experts").json()
    total, model = after["routing"]["total"], after["model"]
    assert total["tokens"] == report["total"]["tokens"]
    assert after["health"] == {"status": "ok", "message": None}
    assert (len(total["share"]), len(total["share"][0])) == (model["num_layers"], model["num_experts"])
    for layer, told in enumerate(report["total"]["layers"]):
        assert abs(sum(total["share"][layer]) - 1) < 0.001
        assert total["share"][layer] == [round(n / sum(told["assigned"]), 4) for n in told["assigned"]]
        assert abs(total["imbalance"][layer] - max(total["share"][layer]) * model["num_experts"]) < 0.01
        assert total["entropy"][layer] == round(told["entropy"], 4)
    assert after["latency"]["inter_token"]["count"] >= 29
    assert sum(after["memory"]["weights"].values()) > 0
    assert after["memory"]["peak"] > 0
