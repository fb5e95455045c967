"""Bad parameters, each beside four good streams whose text must not change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import ANSWER
from tests.server.fake_engine import VOCAB_SIZE
from tests.server.harness import MODEL, Live, error_of


@pytest.fixture
def live(busy_server: Live) -> Live:
    return busy_server


BOTH: dict[str, list[Any]] = {
    "temperature": [-1, -0.001, 2.1, "1", True, [1], {}],
    "top_p": [0, -0.1, 1.1, "1", True],
    "top_k": [-5, -2, 1.5, "5", True, 2**70],
    "min_p": [-0.1, 1.1, "0"],
    "presence_penalty": [-2.1, 2.1, "0"],
    "frequency_penalty": [-2.1, 2.1, True],
    "repetition_penalty": [0, -1, 2.1, "1"],
    "n": [0, -1, 129, 10**9, 1.5, "1", True],
    "seed": [2**63, 2**64, -(2**63) - 1, 1.5, "1"],
    "min_tokens": [-1, 10**18, "1", 10**6],
    "logit_bias": [
        {"x": 1}, {"-1": 1}, {"1.0": 1}, {"": 1}, {"٣": 1}, {str(VOCAB_SIZE): 1}, {"9" * 30: 1}, {"1": 101},
        {"1": -101}, {"1": "1"}, {"1": None}, {"1": True}, [1], "1", {str(token): 1 for token in range(301)},
    ],
    "stop": ["", [""], ["a", ""], ["a"] * 5, "x" * 10_000, ["x" * 10_000], 1, [1], [None], {}],
    "stop_token_ids": [[-1], [VOCAB_SIZE], [2**63], ["a"], [1.5], [True], "a", 5, [5] * 129],
    "ignore_eos": [1, "true", []],
    "include_stop_str_in_output": [0, "no"],
    "skip_special_tokens": [0, "no"],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, True, [], {}],
    "priority": [1.5, "1", True, 2**63],
    "cache_salt": ["", 5, "x" * 2000],
    "model": [5, [], True],
    "response_format": [{"type": "json_schema"}, {"type": "other"}, "text", {}, True],
    "structured_outputs": [{"regex": "a", "choice": ["a"]}, {}],
    "chat_template": ["{{ 1 }}"],
    "routing": [1, "true", []],
    "routing_prompt": [1, "true", {}],
    "experts_per_token": [0, -1, 9, 2**31, 2**70, 1.0, "1", True, [1]],
    "expert_min_p": [-0.1, 1.1, "0", True, [0.1]],
    "expert_mask": [
        list(range(8)), {"1": list(range(8))}, [8], [-1], [2**31], [2**70], ["1"], [1.0], [True], [None], [[1]], 1, "1",
        True, {"2": [1]}, {"-1": [1]}, {"x": [1]}, {"": [1]}, {"00": [1]}, {"1.0": [1]}, {"٣": [1]}, {"9" * 30: [1]},
        {"0": 1}, {"0": [8]}, {"0": ["1"]}, {"0": None}, {"0": {"1": [1]}}, [0] * 1025,
        {str(layer): [] for layer in range(1025)},
    ],
    "suffix": ["x"],
}  # fmt: skip
COMPLETIONS: dict[str, list[Any]] = {
    "max_tokens": [-1, 0, 10**18, 2**63, "5", 1.5, True, [5]],
    "best_of": [0, 129, "2", True],
    "logprobs": [-1, 21, 10**9, True, "1", 1.5],
    "echo": [1, "true"],
}
CHAT: dict[str, list[Any]] = {
    "max_tokens": [-1, 0, 10**18, "5", 1.5],
    "max_completion_tokens": [-1, 0, 10**18, "5", True],
    "logprobs": [1, "true", 0],
    "top_logprobs": [-1, 21, 1, 0, "1"],
    "tools": [[{"type": "function"}], True, "x"],
    "tool_choice": ["required", {"type": "function"}, 5],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={json.dumps(value)[:30]}") for name in table for value in table[name]]


@pytest.mark.parametrize(("name", "value"), cases(BOTH | COMPLETIONS))
def test_parameters_of_completions(live: Live, name: str, value: Any) -> None:
    before = live.call(lambda: len(live.engine.requests))
    error = error_of(live.post("/v1/completions", {"prompt": "Refuse me", "max_tokens": 5} | {name: value}), 400)
    assert error["param"] == name
    assert name in error["message"]
    submitted = live.call(lambda: live.engine.requests[before:])
    assert all(len(request.prompt_ids) == 2 for request in submitted), "only the good streams' prompts were submitted"


@pytest.mark.parametrize(("name", "value"), cases(BOTH | CHAT))
def test_parameters_of_chat(live: Live, name: str, value: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, name: value}
    error = error_of(live.post("/v1/chat/completions", body), 400)
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a", "b"], "best_of": 128}, "n"),
    ],
)
def test_too_many_choices(live: Live, body: dict[str, Any], param: str) -> None:
    assert error_of(live.post("/v1/completions", {"prompt": "Hi"} | body), 400)["param"] == param


def test_null_means_absent(live: Live) -> None:
    names = [name for name in BOTH | COMPLETIONS if name != "model"]
    response = live.post("/v1/completions", {"prompt": "Hi", "model": None} | dict.fromkeys(names))
    assert response.json()["choices"][0]["text"] == ANSWER
    names = [name for name in BOTH | CHAT if name != "model"]
    live.chat(**dict.fromkeys(names))


def test_unknown_and_idle_fields_are_ignored(live: Live) -> None:
    body = {"unknown": {"a": [1]}, "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    live.complete(**body, response_format={"type": "text"}, model=MODEL)
    live.chat(**body, tools=[], tool_choice="auto", parallel_tool_calls=False, n=1)
