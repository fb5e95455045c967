"""Routing over HTTP on a real engine: traces, steering, statistics, and what of them is promised to others."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.sizes import active_params
from tests.e2e.running import Server, running_server
from weights.config import load_config

LAYERS, EXPERTS, TOP_K = 2, 4, 2
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def post(server: Server, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    body = ({"prompt": PROMPT, "max_tokens": 12} if path == "/v1/completions" else {}) | GREEDY | fields
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    body = GREEDY | fields | {"stream": True}
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def report(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/experts").json()
    return found


def reset(server: Server) -> None:
    assert httpx.post(f"{server.url}/v1/experts/reset").status_code == 200


def counters(server: Server) -> dict[str, float]:
    """mixserve_expert_tokens_total by its labels."""
    text = httpx.get(f"{server.url}/metrics").text
    pattern = r'mixserve_expert_tokens_total\{expert="(\d+)",layer="(\d+)",model_name="tiny"\} (\S+)'
    return {f"{layer}/{expert}": float(value) for expert, layer, value in re.findall(pattern, text)}


def used_experts(trace: list[dict[str, Any]], layer: int) -> Counter[int]:
    return Counter(expert for token in trace for expert in token["experts"][layer])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 30, "n": 2, "temperature": 1, "seed": 3}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 30, "expert_min_p": 0.5, "experts_per_token": 4}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 0, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}),
    ],
)
def test_a_streamed_trace_is_the_whole_one(tiny_server: Server, path: str, fields: dict[str, Any]) -> None:
    fields = fields | {"routing": True, "routing_prompt": True}
    whole = post(tiny_server, path, **fields)
    streamed: list[dict[str, Any]] = [{"prompt": [], "tokens": []} for _ in whole["choices"]]
    for chunk in stream(tiny_server, path, **fields):
        (choice,) = chunk["choices"]
        for name, entries in choice.get("routing", {}).items():
            streamed[choice["index"]][name] += entries
    assert streamed == [choice["routing"] for choice in whole["choices"]]
    num_choices = len(whole["choices"])
    assert sum(len(trace["tokens"]) for trace in streamed) == whole["usage"]["completion_tokens"]
    assert [len(trace["prompt"]) for trace in streamed] == [whole["usage"]["prompt_tokens"]] * num_choices


def test_what_a_trace_says(tiny_server: Server) -> None:
    trace = post(tiny_server, routing=True, routing_prompt=True)["choices"][0]["routing"]
    assert (len(trace["prompt"]), len(trace["tokens"])) == (len(PROMPT), 12)
    assert trace["tokens"][0] == trace["prompt"][-1], "the pass of the last prompt token made the first new one"
    for token in trace["prompt"] + trace["tokens"]:
        assert token.keys() == {"experts", "weights", "entropy"}
        assert len(token["experts"]) == len(token["weights"]) == len(token["entropy"]) == LAYERS
        for experts, weights, entropy in zip(token["experts"], token["weights"], token["entropy"], strict=True):
            assert len(set(experts)) == len(experts) == len(weights) == TOP_K
            assert weights == sorted(weights, reverse=True)
            assert sum(weights) == pytest.approx(1, abs=2e-4)
            assert 0 < entropy <= math.log(EXPERTS)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_mask_keeps_experts_out(tiny_server: Server, top_k: int) -> None:
    fields: dict[str, Any] = {
        "routing": True,
        "routing_prompt": True,
        "experts_per_token": top_k,
        "max_tokens": 40,
    }
    masks: list[dict[str, Any]] = [{}, {"expert_mask": [0, 2]}, {"expert_mask": {"1": [1, 2, 3]}}]
    plain, everywhere, one_layer = (post(tiny_server, **fields, **mask)["choices"][0]["routing"] for mask in masks)

    def experts_of(trace: dict[str, Any], layer: int) -> set[int]:
        return set(used_experts(trace["prompt"] + trace["tokens"], layer))

    assert [experts_of(plain, layer) for layer in range(LAYERS)] == [{0, 1, 2, 3}] * 2, "there is something to keep out"
    assert [experts_of(everywhere, layer) for layer in range(LAYERS)] == [{1, 3}] * 2
    assert [experts_of(one_layer, layer) for layer in range(LAYERS)] == [{0, 1, 2, 3}, {0}]
    assert {len(token["experts"][1]) for token in everywhere["tokens"]} == {min(top_k, 2)}
    assert {len(token["experts"][1]) for token in one_layer["tokens"]} == {1}


def test_counts_are_those_of_the_trace(tiny_server: Server) -> None:
    """Every computed token once: the prompt and all new tokens but the last, which nobody reads."""
    before = counters(tiny_server)
    reset(tiny_server)
    fields: dict[str, Any] = {"cache_salt": "counts", "max_tokens": 20, "routing": True, "routing_prompt": True}
    trace = post(tiny_server, **fields)["choices"][0]["routing"]
    computed = trace["prompt"] + trace["tokens"][1:]
    found = report(tiny_server)
    assert (found["router"], found["num_experts"], found["recomputed_tokens"]) == ("topk_softmax", EXPERTS, 0)
    for part in (found["window"], found["total"]):
        assert (part["tokens"], part["steps"]) == (len(PROMPT) + 19, 20)
        for number, layer in enumerate(part["layers"]):
            used = used_experts(computed, number)
            assert layer["dispatched"] == layer["assigned"] == [used[expert] for expert in range(EXPERTS)]
            assert sum(layer["dispatched"]) == part["tokens"] * TOP_K
            assert layer["dropped"] == 0
            entropy = sum(token["entropy"][number] for token in computed) / len(computed)
            assert layer["entropy"] == pytest.approx(entropy, abs=1e-4)
            assert layer["entropy_share"] == pytest.approx(entropy / math.log(EXPERTS), abs=1e-4)
            assert sum(layer["mean_probability"]) == pytest.approx(1)
            load = [used[expert] for expert in range(EXPERTS)]
            assert layer["max_over_mean"] == pytest.approx(max(load) * EXPERTS / sum(load))
    after = counters(tiny_server)
    assert len(after) == LAYERS * EXPERTS
    for number, layer in enumerate(found["total"]["layers"]):
        for expert, tokens in enumerate(layer["dispatched"]):
            assert after[f"{number}/{expert}"] - before[f"{number}/{expert}"] == tokens


def test_what_if_is_exact_over_the_window(tiny_server: Server) -> None:
    """One step: the overflow can be counted from the trace of the prompt."""
    reset(tiny_server)
    prompt = list(range(100, 137))
    answer = post(tiny_server, prompt=prompt, max_tokens=1, routing_prompt=True)
    trace = answer["choices"][0]["routing"]["prompt"]
    overflows = []
    for factor in (0.1, 0.5, 1.0, 1.25, 5.0):
        found = httpx.get(f"{tiny_server.url}/v1/experts/what_if", params={"capacity_factor": factor}).json()
        capacity = math.ceil(factor * TOP_K * len(prompt) / EXPERTS)
        expected = [
            [max(0, used_experts(trace, layer)[expert] - capacity) for expert in range(EXPERTS)]
            for layer in range(LAYERS)
        ]
        window = found["window"]
        assert window["by_expert"] == expected
        assert window["by_layer"] == [sum(layer) for layer in expected]
        assert (found["window_steps"], window["assigned"]) == (1, LAYERS * TOP_K * len(prompt))
        on_the_table = factor <= 4
        assert (found["total"]["exact"], found["total"]["overflow"]) == (on_the_table, window["overflow"])
        overflows.append(window["overflow"])
    assert overflows[0] > overflows[1] > 0
    assert overflows[-1] == 0


def test_a_reset_starts_anew_but_counters_go_on(tiny_server: Server) -> None:
    post(tiny_server)
    before = counters(tiny_server)
    reset(tiny_server)
    found = report(tiny_server)
    assert (found["total"]["tokens"], found["window"]["steps"], found["recomputed_tokens"]) == (0, 0, 0)
    assert counters(tiny_server) == before
    assert "mixserve_router_entropy{" not in httpx.get(f"{tiny_server.url}/metrics").text
    post(tiny_server)
    assert all(after >= before[labels] for labels, after in counters(tiny_server).items())
    text = httpx.get(f"{tiny_server.url}/metrics").text
    for name in ("load_max_over_mean", "load_cv", "effective_batch", "distinct"):
        assert f'mixserve_expert_{name}{{layer="1",model_name="tiny"}}' in text
    for name in ("router_entropy", "router_auxiliary_loss", "expert_dropped_total"):
        assert f'mixserve_{name}{{layer="0",model_name="tiny"}}' in text


def test_steered_requests_leave_plain_ones_alone(tiny_server: Server) -> None:
    plain: dict[str, Any] = {"max_tokens": 60, "prompt": "a long story", "logprobs": 0}

    def tokens(**steering: Any) -> list[str]:
        return list(post(tiny_server, **plain, **steering)["choices"][0]["logprobs"]["tokens"])

    alone = tokens()
    steerings: list[dict[str, Any]] = [
        {"experts_per_token": 1},
        {"experts_per_token": 4},
        {"expert_mask": [0, 1, 2]},
        {"expert_mask": {"0": [3]}},
        {"expert_min_p": 1},
        {"experts_per_token": 4, "expert_min_p": 0.3, "expert_mask": [1]},
    ]
    steered_alone = [tokens(**steering) for steering in steerings]
    assert alone not in steered_alone, "every one of them changes the answer"
    with ThreadPoolExecutor(20) as pool:
        running = [pool.submit(tokens, **steering) for steering in [*steerings, *[{}] * 4] * 2]
        together = [future.result() for future in running]
    assert together == [*steered_alone, *[alone] * 4] * 2


def test_steering_has_prefixes_of_its_own(tiny_server: Server) -> None:
    def cached(**fields: Any) -> int:
        usage = post(tiny_server, prompt=[7] * 40, cache_salt="steered", **fields)["usage"]
        return int(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))

    assert [cached(), cached()] == [0, 32]
    assert [cached(experts_per_token=1), cached(experts_per_token=1), cached(experts_per_token=4)] == [0, 32, 0]
    assert [cached(expert_mask={"1": [2, 0]}), cached(expert_mask={"1": [0, 2]})] == [0, 32], "one mask, two spellings"
    assert cached(routing_prompt=True) == 0, "all of the prompt is traced, so all of it is computed"
    assert cached(routing=True) == 32


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_active_params_per_token(tiny_server: Server, tiny_checkpoint: Path, top_k: int) -> None:
    config = replace(load_config(tiny_checkpoint), num_experts_per_tok=top_k)
    usage = post(tiny_server, experts_per_token=top_k, n=2)["usage"]
    assert usage["active_params_per_token"] == active_params(config)
    assert "active_params_per_token" not in post(tiny_server)["usage"]


def test_active_params_with_min_p(tiny_server: Server, tiny_checkpoint: Path) -> None:
    config = load_config(tiny_checkpoint)
    answer = post(tiny_server, expert_min_p=0.6, routing=True, routing_prompt=True)
    trace = answer["choices"][0]["routing"]
    computed = trace["prompt"] + trace["tokens"][1:]
    visits = sum(len(layer) for token in computed for layer in token["experts"]) / len(computed) / LAYERS
    assert 1 < visits < 2
    one, two = (active_params(replace(config, num_experts_per_tok=top_k)) for top_k in (1, 2))
    assert answer["usage"]["active_params_per_token"] == round(one + (visits - 1) * (two - one))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts_per_token", "0"),
        ("experts_per_token", "5"),
        ("experts_per_token", "NaN"),
        ("expert_min_p", "1.5"),
        ("expert_min_p", "NaN"),
        ("expert_mask", "[0, 1, 2, 3]"),
        ("expert_mask", "[4]"),
        ("expert_mask", '{"0": [0, 1], "1": [3, 2, 1, 0]}'),
        ("expert_mask", '{"2": [0]}'),
        ("routing", '"yes"'),
        ("routing_prompt", "1"),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bad_steering(tiny_server: Server, path: str, name: str, value: str) -> None:
    start = '{"prompt": "Hi"' if path == "completions" else '{"messages": [{"role": "user", "content": "Hi"}]'
    content = f'{start}, "max_tokens": 2, "{name}": {value}}}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{tiny_server.url}/v1/{path}", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


@pytest.fixture(scope="module")
def capacity_server(tiny_checkpoint: Path) -> Iterator[Server]:
    options = ("--served-model-name", "tiny", "--dtype", "float32", "--router", "switch", "--capacity-factor", "0.5")
    with running_server(str(tiny_checkpoint), *options) as server:
        yield server


def test_a_capacity_drops_and_says_so(capacity_server: Server) -> None:
    prompt = list(range(100, 140))
    answer = post(capacity_server, prompt=prompt, max_tokens=1, routing_prompt=True)
    trace = answer["choices"][0]["routing"]["prompt"]
    found = report(capacity_server)
    assert (found["router"], found["capacity_factor"], found["num_experts_per_tok"]) == ("switch", 0.5, 1)
    for number, layer in enumerate(found["total"]["layers"]):
        used = used_experts(trace, number)
        assert layer["dispatched"] == [used[expert] for expert in range(EXPERTS)], (
            "what was dropped is not in the trace"
        )
        assert max(layer["dispatched"]) <= math.ceil(0.5 * 1 * len(prompt) / EXPERTS)
        assert layer["dropped"] == len(prompt) - sum(layer["dispatched"]) > 0
        text = httpx.get(f"{capacity_server.url}/metrics").text
        assert f'mixserve_expert_dropped_total{{layer="{number}",model_name="tiny"}} {layer["dropped"]:.1f}' in text
    log = capacity_server.log_text()
    assert "routing   switch, capacity factor 0.5, recorded; no prefix caching" in log
    assert "prefix caching off" in log
    body = GREEDY | {"prompt": [1], "experts_per_token": 2}
    refused = httpx.post(f"{capacity_server.url}/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "experts_per_token")


def test_simulated_routing_is_even_and_loud(tiny_checkpoint: Path) -> None:
    options = ("--served-model-name", "tiny", "--load-format", "dummy", "--routing-simulation", "even")
    with running_server(str(tiny_checkpoint), *options) as server:
        (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert card["routing_simulation"] == "even"
        post(server, prompt=[5] * 40, max_tokens=1)
        found = report(server)
        assert found["simulation"] == "even"
        assert [layer["assigned"] for layer in found["total"]["layers"]] == [[20] * EXPERTS] * LAYERS
        assert "ROUTING IS SIMULATED (even)" in server.log_text()


def test_without_a_record(tiny_checkpoint: Path) -> None:
    options = ("--served-model-name", "tiny", "--dtype", "float32", "--no-record-routing")
    with running_server(str(tiny_checkpoint), *options) as server:
        answer = httpx.get(f"{server.url}/v1/experts")
        assert (answer.status_code, "--no-record-routing" in answer.text) == (400, True)
        assert counters(server) == {}
        refused = httpx.post(f"{server.url}/v1/completions", json=GREEDY | {"prompt": [1], "routing": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "routing")
        assert post(server, experts_per_token=1)["usage"]["active_params_per_token"] > 0
