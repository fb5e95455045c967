"""Routing in completions and chats: what reaches the engine, traces, and what a steered token cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.text import Tokenizer
from engine.types import Request, Steering
from server.routing import token_trace
from tests.server.conftest import ANSWER
from tests.server.fake_engine import EOS, FakeEngine, fake_info
from tests.server.fake_routing import fake_routing
from tests.server.harness import MODEL, Live, error_of, live_server

INFO = fake_info()
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    return ({"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}) | fields


def whole(server: Live, path: str, **fields: Any) -> dict[str, Any]:
    response = server.post(path, body_for(path, **fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def requests(server: Live) -> list[Request]:
    return server.call(lambda: list(server.engine.requests))


def traces(tokens: list[int], top_k: int = 2) -> list[Any]:
    return [token_trace(fake_routing(token, INFO, top_k)) for token in tokens]


@pytest.fixture
def answer_ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(ANSWER.strip(), add_special_tokens=False)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("fields", "steering"),
    [
        ({}, None),
        ({"expert_mask": [], "expert_min_p": 0, "experts_per_token": None}, None),
        ({"expert_mask": {}}, None),
        ({"expert_mask": {"0": [], "1": []}}, None),
        ({"experts_per_token": 1}, Steering(experts_per_token=1)),
        ({"experts_per_token": 2}, Steering(experts_per_token=2)),  # asked for, though it is the model's own
        ({"expert_min_p": 1}, Steering(min_p=1.0)),
        ({"expert_mask": [5, 3, 3]}, Steering(forbidden=((None, (3, 5)),))),
        ({"expert_mask": {"1": [7], "0": [2, 1, 2]}}, Steering(forbidden=((0, (1, 2)), (1, (7,))))),
        (
            {"experts_per_token": 8, "expert_min_p": 0.25, "expert_mask": {"0": [], "1": [0]}},
            Steering(experts_per_token=8, min_p=0.25, forbidden=((1, (0,)),)),
        ),
    ],
)
def test_steering_reaches_the_engine(
    server: Live, path: str, fields: dict[str, Any], steering: Steering | None
) -> None:
    usage = whole(server, path, n=2, **fields)["usage"]
    assert [request.steering for request in requests(server)] == [steering] * 2
    assert not any(request.trace_routing or request.trace_prompt_routing for request in requests(server))
    assert ("active_params_per_token" in usage) is (steering is not None)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_active_params(server: Live, path: str) -> None:
    """1,000,000 active with two experts of 100,000: 800,000 are shared."""
    for top_k, expected in ((1, 900_000), (2, 1_000_000), (8, 1_600_000)):
        body = body_for(path, experts_per_token=top_k, n=3)
        assert whole(server, path, **body)["usage"]["active_params_per_token"] == expected
        *_, last = server.chunks(path, body | {"stream_options": {"include_usage": True}})
        assert last["usage"]["active_params_per_token"] == expected


def test_active_params_without_a_record(tokenizer: Tokenizer) -> None:
    info = replace(fake_info(), record_routing=False)
    with live_server(lambda: FakeEngine(lambda _: [5], info=info), tokenizer) as live:
        assert live.complete(experts_per_token=1)["usage"]["active_params_per_token"] == 900_000
        assert live.complete(expert_min_p=0.5)["usage"]["active_params_per_token"] == 1_000_000, "the nominal K"
        assert error_of(live.post(COMPLETIONS, {"prompt": "Hi", "routing": True}), 400)["param"] == "routing"
        assert error_of(live.post(COMPLETIONS, {"prompt": "Hi", "routing_prompt": True}), 400)["param"] == (
            "routing_prompt"
        )


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_trace(server: Live, answer_ids: list[int], path: str) -> None:
    answer = whole(server, path, routing=True)
    (choice,) = answer["choices"]
    assert choice["routing"].keys() == {"tokens"}
    assert choice["routing"]["tokens"] == traces([*answer_ids, EOS])
    assert len(choice["routing"]["tokens"]) == answer["usage"]["completion_tokens"], "the end of sequence counts"
    first = choice["routing"]["tokens"][0]
    expert = answer_ids[0] % 8
    assert first == {
        "experts": [[expert, (expert + 1) % 8], [(expert + 1) % 8, (expert + 2) % 8]],
        "weights": [[0.6667, 0.3333]] * 2,
        "entropy": [1.2346, 2.2346],
    }
    assert "active_params_per_token" not in answer["usage"], "tracing is not steering"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("both", [False, True])
def test_a_trace_of_the_prompt(server: Live, answer_ids: list[int], path: str, both: bool) -> None:
    routing = whole(server, path, routing_prompt=True, routing=both)["choices"][0]["routing"]
    assert routing.keys() == ({"prompt", "tokens"} if both else {"prompt"})
    assert routing["prompt"] == traces(list(requests(server)[0].prompt_ids))
    assert not both or routing["tokens"] == traces([*answer_ids, EOS])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_nobody_else_sees_a_trace(server: Live, path: str) -> None:
    for fields in ({}, {"routing": False, "routing_prompt": False}):
        assert "routing" not in whole(server, path, **fields)["choices"][0]
        for chunk in server.chunks(path, body_for(path, **fields)):
            assert "routing" not in chunk["choices"][0]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {"routing": True},
        {"routing_prompt": True},
        {"routing": True, "routing_prompt": True, "n": 3},
        {"routing": True, "max_tokens": 3},
        {"routing": True, "stop": "the fake"},
        {"routing": True, "stop": [" fake engine. And", "zz"]},  # held back to the end
        {"routing": True, "stop": "Hello"},
        {"routing": True, "stop_token_ids": [5]},
        {"routing": True, "logprobs": 1, "experts_per_token": 3},
        {"routing": True, "routing_prompt": True, "echo": True},
    ],
    ids=str,
)
def test_the_chunks_of_a_trace_are_the_whole(server: Live, path: str, fields: dict[str, Any]) -> None:
    if path == CHAT:
        fields = {name: value for name, value in fields.items() if name != "echo"}
        fields = fields | {"logprobs": True} if "logprobs" in fields else fields
    found = whole(server, path, **fields)
    streamed: list[dict[str, Any]] = [{} for _ in found["choices"]]
    firsts: dict[int, dict[str, Any]] = {}
    for chunk in server.chunks(path, body_for(path, **fields)):
        (choice,) = chunk["choices"]
        has_text = choice["delta"].get("content") if path == CHAT else choice["text"]
        if has_text or choice["finish_reason"]:
            firsts.setdefault(choice["index"], choice)
        for name, entries in choice.get("routing", {}).items():
            assert entries, "a list with nothing in it is left out"
            streamed[choice["index"]].setdefault(name, []).extend(entries)
    assert streamed == [
        {name: entries for name, entries in choice["routing"].items() if entries} for choice in found["choices"]
    ]
    if fields.get("routing_prompt"):
        assert all("prompt" in first["routing"] for first in firsts.values())
    num_tokens = sum(len(choice["routing"].get("tokens", ())) for choice in found["choices"])
    assert num_tokens == (found["usage"]["completion_tokens"] if fields.get("routing") else 0)


def test_each_chunk_has_the_entries_of_its_tokens(server: Live, tokenizer: Tokenizer) -> None:
    """A parrot is four byte tokens: the chunk that brings it has four entries; the last has the end of sequence."""
    tokens = tokenizer.encode("a 🦜 b", add_special_tokens=False)
    server.call(lambda: setattr(server.engine, "script", lambda _: tokens))
    chunks = [chunk["choices"][0] for chunk in server.chunks(COMPLETIONS, {"prompt": "Hi", "routing": True})]
    found = [(chunk["text"], len(chunk["routing"]["tokens"])) for chunk in chunks]
    assert found == [(" a", 1), (" ", 1), ("🦜", 4), (" b", 1), ("", 1)]


def test_a_prompt_that_is_only_traced(server: Live) -> None:
    answer = server.complete(prompt=[5, 6, 7], echo=True, max_tokens=0, routing=True, routing_prompt=True)
    assert answer["choices"][0]["routing"] == {"prompt": traces([5, 6, 7]), "tokens": []}
    assert answer["usage"]["completion_tokens"] == 0


def test_the_best_keeps_its_own_trace(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda request: [16 + (request.params.choice + 3) % 5]))
    answer = server.complete(prompt=[5], n=2, best_of=5, max_tokens=1, routing=True)
    assert [choice["routing"]["tokens"] for choice in answer["choices"]] == [traces([16]), traces([17])]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"routing": True, "n": 128}, "routing"),
        ({"routing_prompt": True, "prompt": [[5] * 100] * 128, "max_tokens": 1}, "routing_prompt"),
        ({"routing": True, "n": 64, "experts_per_token": 4}, "routing"),
    ],
)
def test_traces_have_a_limit_over_all_choices(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    """4,000,000 places in all, and here 200 layers of 2 experts: 10,000 tokens, each choice far below that."""
    info = replace(fake_info(max_model_len=4096), num_layers=200)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live:
        body = {"prompt": "Hi", "max_tokens": 100} | fields
        error = error_of(live.post(COMPLETIONS, body), 400)
        assert error["param"] == param
        assert "2500" in error["message"] or "1250" in error["message"]
        assert live.call(lambda: live.engine.requests) == []
        one = body | ({"n": 1} if "n" in body else {"prompt": [5] * 100})
        assert live.post(COMPLETIONS, one).status_code == 200


def test_the_official_client_gets_it_too(server: Live) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"routing": True, "experts_per_token": 1},
        )
    assert answer.choices[0].model_extra is not None
    assert len(answer.choices[0].model_extra["routing"]["tokens"]) == 7
    assert answer.usage is not None
    assert answer.usage.model_extra == {"active_params_per_token": 900_000}


def test_a_long_prompt_is_traced_beside_others(tokenizer: Tokenizer) -> None:
    """Its trace is made in a thread of its own; it is the same."""
    prompt = [5 + token % 100 for token in range(1500)]
    with live_server(lambda: FakeEngine(lambda _: [8, 9], info=fake_info(max_model_len=4096)), tokenizer) as live:
        answer = live.complete(prompt=prompt, routing=True, routing_prompt=True)
        assert answer["choices"][0]["routing"] == {"prompt": traces(prompt), "tokens": traces([8, 9, EOS])}
        stop = live.complete(prompt=prompt, routing=True, routing_prompt=True, n=2, max_tokens=1)
        assert [choice["routing"]["tokens"] for choice in stop["choices"]] == [traces([8])] * 2
