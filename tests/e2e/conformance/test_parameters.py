"""API.md's table of parameters: the ends of each range are taken, what is beyond is a 400 that names the parameter."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conformance.asking import END, MODEL, Ask

ENDLESS = {"ignore_eos": True}

IN_RANGE: dict[str, list[Any]] = {
    "temperature": [0, 1e-6, 2, None],
    "top_p": [0.001, 1, None],
    "top_k": [-1, 0, 1, 100_000, None],
    "min_p": [0, 1, None],
    "presence_penalty": [-2, 2, None],
    "frequency_penalty": [-2, 2, None],
    "repetition_penalty": [0.01, 2, None],
    "n": [1, 3, None],
    "logit_bias": [{}, {"0": -100, "259": 100}, {str(token): 1 for token in range(260)}, None],
    "stop": ["x", ["a"], ["a", "b", "c", "d"], [], None],
    "stop_token_ids": [[], [0, 259], None],
    "ignore_eos": [True, False, None],
    "min_tokens": [0, 3, None],
    "include_stop_str_in_output": [True, False, None],
    "skip_special_tokens": [True, False, None],
    "seed": [0, -(2**63), 2**63 - 1, None],
    "user": ["me", None],
    "metadata": [{"a": "b"}, None],
    "store": [True, False, None],
    "service_tier": ["auto", "default", "flex", None],
    "priority": [-5, 0, 5, None],
    "cache_salt": ["pepper", None],
    "routing": [True, False, None],
    "routing_prompt": [True, False, None],
    "experts_per_token": [1, 4, None],
    "expert_min_p": [0, 0.5, None],
    "expert_mask": [[], [0], {"0": [1], "1": []}, None],
    "response_format": [{"type": "text"}, None],
    "structured_outputs": [None],
    "nobody_knows_this": [1, "x", [{}], None],
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, "1", True],
    "top_p": [0, 1.1, "1"],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, 2.1],
    "n": [0, 129, 10**9],
    "logit_bias": [{"260": 1}, {"x": 1}, {"0": 101}, {"0": -101}, {str(token): 1 for token in range(301)}],
    "stop": ["", [""], ["a"] * 5, 5, [5]],
    "stop_token_ids": [[260], [-1], "a"],
    "ignore_eos": [1, "true"],
    "min_tokens": [-1, 4],
    "seed": [2**63, -(2**63) - 1, 1.5],
    "stream_options": [{"include_usage": "yes"}, []],
    "priority": ["high", 1.5],
    "cache_salt": ["", 5],
    "experts_per_token": [0, 5],
    "expert_min_p": [-0.1, 1.1],
    "expert_mask": [[4], {"2": [0]}, "0"],
    "response_format": ["json", {"type": "xml"}, {"type": "json_schema"}],
    "structured_outputs": [{}, {"regex": "a", "choice": ["a"]}, "a", {"choice": []}],
    "chat_template": ["{{ messages }}"],
    "model": [5],
}
ONLY_COMPLETIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["a", ["a", "b"], [97], [[97], [98, 99]]], ["", [], [[]], [""], [1, "a"], [1.5], [True], [260], [-1]]),
    "max_tokens": ([1, 7, None], [0, -1, 1.5, "5", 2**31]),
    "logprobs": ([0, 20, None], [-1, 21, True]),
    "best_of": ([1, None], [0, 129]),
    "echo": ([True, False, None], [1, "yes"]),
    "suffix": ([None], ["end"]),
}
ONLY_CHAT: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": (
        [
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}],
        ],
        [
            [],
            "Hi",
            [{"role": "robot", "content": "a"}],
            [{"role": "user"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}],
        ],
    ),
    "max_tokens": ([1, 7], [0, -1, 1.5]),
    "max_completion_tokens": ([1, 7, None], [0, -1]),
    "top_logprobs": ([], [-1, 21, 5]),
    "logprobs": ([True, False, None], [5, "yes"]),
    "tool_choice": (["none", "auto", None], ["required", "any", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": ([True, False, None], []),
}


def cases(columns: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{ascii(value)[:30]}") for name in columns for value in columns[name]]


def send(ask: Ask, path: str, name: str, value: Any) -> Any:
    """The parameter goes as it is: the client checks nothing of what is in `extra_body`."""
    body = {"max_tokens": 3} | {name: value}
    return ask.chat(extra=body, max_tokens=3) if path == "chat" else ask.complete(extra=body, max_tokens=3)


@pytest.mark.parametrize("path", ["completions", "chat"])
@pytest.mark.parametrize(("name", "value"), cases(IN_RANGE))
def test_taken_by_both(ask: Ask, path: str, name: str, value: Any) -> None:
    assert len(send(ask, path, name, value).choices) == (3 if value == 3 and name == "n" else 1)


@pytest.mark.parametrize(("name", "value"), cases({name: good for name, (good, _) in ONLY_COMPLETIONS.items()}))
def test_taken_by_completions(ask: Ask, name: str, value: Any) -> None:
    assert send(ask, "completions", name, value).choices


@pytest.mark.parametrize(("name", "value"), cases({name: good for name, (good, _) in ONLY_CHAT.items()}))
def test_taken_by_chat(ask: Ask, name: str, value: Any) -> None:
    assert send(ask, "chat", name, value).choices


def refused(ask: Ask, path: str, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        send(ask, path, name, value)
    assert caught.value.param == name
    assert caught.value.code is None
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("path", ["completions", "chat"])
@pytest.mark.parametrize(("name", "value"), cases(OUT_OF_RANGE))
def test_refused_by_both(ask: Ask, path: str, name: str, value: Any) -> None:
    refused(ask, path, name, value)


@pytest.mark.parametrize(("name", "value"), cases({name: bad for name, (_, bad) in ONLY_COMPLETIONS.items()}))
def test_refused_by_completions(ask: Ask, name: str, value: Any) -> None:
    refused(ask, "completions", name, value)


@pytest.mark.parametrize(("name", "value"), cases({name: bad for name, (_, bad) in ONLY_CHAT.items()}))
def test_refused_by_chat(ask: Ask, name: str, value: Any) -> None:
    refused(ask, "chat", name, value)


@pytest.mark.parametrize("value", [{}, {"include_usage": True}])
def test_stream_options_need_stream(client: openai.OpenAI, value: Any) -> None:
    for path in ("completions", "chat"):
        refused(Ask(client, stream=False), path, "stream_options", value)


def test_best_of_under_n(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        Ask(client, stream=False).complete(n=3, best_of=2)
    assert caught.value.param == "best_of"


def test_completions_generate_16_tokens_unless_told(ask: Ask) -> None:
    assert ask.complete(extra=ENDLESS).usage.completion_tokens == 16


def test_max_completion_tokens_goes_before_max_tokens(ask: Ask) -> None:
    assert ask.chat(max_tokens=5, max_completion_tokens=3, extra=ENDLESS).usage.completion_tokens == 3


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_a_temperature_under_1e_5_is_greedy(ask: Ask, temperature: float) -> None:
    choice = ask.complete(temperature=temperature, logprobs=1, max_tokens=8, extra=ENDLESS).only
    for token, top in zip(choice.tokens, choice.top_logprobs, strict=True):
        assert top is not None
        assert top[token] == max(top.values())


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}])
def test_cutting_all_but_the_likeliest_is_greedy(ask: Ask, fields: dict[str, float]) -> None:
    greedy = ask.complete(temperature=0, max_tokens=8, logprobs=0, extra=ENDLESS).only.tokens
    assert ask.complete(temperature=2, max_tokens=8, logprobs=0, extra=ENDLESS | fields).only.tokens == greedy


def test_a_seed_means_the_same_draws(ask: Ask) -> None:
    def tokens(seed: int) -> list[str]:
        return ask.complete(seed=seed, logprobs=0, max_tokens=12, extra=ENDLESS).only.tokens

    assert tokens(-5) == tokens(-5)
    assert tokens(-5) != tokens(5)


def test_logit_bias_forces_and_forbids(ask: Ask) -> None:
    assert ask.complete(logit_bias={"97": 100}, max_tokens=4).only.text == "aaaa"
    allowed = {str(token): -100 for token in range(260) if token not in (97, 98)}
    assert set(ask.complete(logit_bias=allowed, max_tokens=8, seed=1).only.text) == {"a", "b"}


def test_penalties_change_what_is_said_again(ask: Ask) -> None:
    """Only "a" and "b" can be said, "a" far more likely, unless that costs."""

    def said(**extra: float) -> str:
        bias = {"97": 100, "98": 80} | {str(token): -100 for token in range(260) if token not in (97, 98)}
        return ask.complete(logit_bias=bias, temperature=0, max_tokens=40, extra=ENDLESS | extra).only.text

    assert said() == said(presence_penalty=2) == "a" * 40
    assert "b" in said(frequency_penalty=2)
    assert "b" not in said(frequency_penalty=-2)
    plain, *others = (
        ask.complete(seed=1, max_tokens=60, extra=ENDLESS | extra).only.text
        for extra in ({}, {"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2})
    )
    assert plain not in others


def test_min_tokens_forbids_an_early_end(ask: Ask) -> None:
    bias = {str(END): 100, "97": 90}
    assert ask.complete(logit_bias=bias, temperature=0).usage.completion_tokens == 1
    answer = ask.complete(logit_bias=bias, temperature=0, extra={"min_tokens": 3})
    assert (answer.only.text, answer.only.finish_reason, answer.usage.completion_tokens) == ("aaa", "stop", 4)


def test_special_tokens_are_shown_where_that_is_asked(ask: Ask) -> None:
    bias = {"258": 100}
    assert ask.complete(logit_bias=bias, max_tokens=2).only.text == ""
    shown = ask.complete(logit_bias=bias, max_tokens=2, extra={"skip_special_tokens": False})
    assert shown.only.text == "<|im_start|>" * 2


def test_prompts_of_text_and_ids_say_the_same(ask: Ask) -> None:
    def said(prompt: Any) -> list[str]:
        return [choice.text for choice in ask.complete(prompt=prompt, temperature=0, max_tokens=6).choices]

    assert said("abc") == said([97, 98, 99])
    assert said(["abc", "de"]) == said([[97, 98, 99], [100, 101]])
    assert said(["abc"]) == said("abc")


def test_the_model_may_be_left_out(client: openai.OpenAI) -> None:
    answer: Any = client.post("/completions", cast_to=object, body={"prompt": "Hi", "max_tokens": 1})
    assert answer["model"] == MODEL


def test_routing_is_told_token_by_token(client: openai.OpenAI) -> None:
    """A documented key that the client does not know: it allows extras."""
    answer: Any = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=4, extra_body=ENDLESS | {"routing": True, "experts_per_token": 1}
    )
    assert len(answer.choices[0].routing["tokens"]) == 4
    assert answer.usage.active_params_per_token > 0
