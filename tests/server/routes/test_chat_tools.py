"""Tools over HTTP: what the model is told, what it must write, and what comes back, whole and streamed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
from openai import OpenAI

from engine.text import Tokenizer
from engine.types import Request
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, live_server
from tests.server.routes.tool_answers import ASK, OTHER, PARIS, TOOL, USER, call, joined, without_ids, written
from tests.server.tools.kinds import KINDS, tokenizer_of

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kind_tokenizer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(kind, tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def kind_server(kind_tokenizer: Tokenizer) -> Iterator[Live]:
    info = fake_info(max_model_len=8192, num_blocks=10_000)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), kind_tokenizer) as live:
        yield live


Say = Callable[..., Live]


@pytest.fixture
def say(kind_server: Live, kind_tokenizer: Tokenizer) -> Say:
    """Make the engine write these texts, one a request, over and over."""

    def make(*texts: str) -> Live:
        answers = cycle([kind_tokenizer.encode(text, add_special_tokens=False) for text in texts])

        def reset() -> None:
            kind_server.engine.script = lambda _: next(answers)
            kind_server.engine.requests.clear()

        kind_server.call(reset)
        return kind_server

    return make


def prompt(live: Live, tokenizer: Tokenizer) -> str:
    request: Request = live.call(lambda: live.engine.requests[-1])
    return tokenizer.decode(request.prompt_ids, skip_special_tokens=False)


def test_a_call(say: Say, kind: str) -> None:
    live = say(written(kind, ("get_weather", PARIS)))
    choice = live.chat(**ASK)["choices"][0]
    expected = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", PARIS)]}
    assert without_ids(choice) == (expected, "tool_calls")
    call_id = choice["message"]["tool_calls"][0]["id"]
    assert len(call_id) == 9 if kind.startswith("mistral") else call_id.startswith("call_")
    chunks = live.chunks(PATH, ASK)
    assert joined(chunks) == (expected, "tool_calls")
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:1]] == [{"role": "assistant", "content": None}]
    assert len(chunks) > 10, "the arguments come piece by piece"


@pytest.mark.parametrize(
    ("calls", "before"),
    [
        ((("get_weather", PARIS), ("time", "{}")), ""),
        ((("time", '{"a": [1, "é 🦜"]}'),), "Let me see.\n"),
        ((("no_such_tool", "{}"), ("time", "{}"), ("time", '{"b":2}')), ""),
    ],
)
def test_calls_with_and_without_text(say: Say, kind: str, calls: tuple[tuple[str, str], ...], before: str) -> None:
    live = say(before + written(kind, *calls))
    expected = {"role": "assistant", "content": before or None, "tool_calls": [call(*item) for item in calls]}
    assert without_ids(live.chat(**ASK)["choices"][0]) == (expected, "tool_calls")
    assert joined(live.chunks(PATH, ASK)) == (expected, "tool_calls")


@pytest.mark.parametrize(
    "text", ["Hello there.", "<b> and [TOOL", "  spaced  ", '{"name": "time", "arguments": {}}', "a\n</tool_cal"]
)
def test_an_answer_without_calls(say: Say, text: str) -> None:
    live = say(text)
    expected = {"role": "assistant", "content": text}
    assert without_ids(live.chat(**ASK)["choices"][0]) == (expected, "stop")
    assert joined(live.chunks(PATH, ASK)) == (expected, "stop")


def test_an_empty_answer(say: Say) -> None:
    live = say("")
    assert without_ids(live.chat(**ASK)["choices"][0]) == ({"role": "assistant", "content": ""}, "stop")
    assert joined(live.chunks(PATH, ASK)) == ({"role": "assistant", "content": ""}, "stop")


def test_a_malformed_call_is_content(say: Say, kind: str) -> None:
    text = written(kind, ("get_weather", "5"))
    live = say(text)
    content = text if kind.endswith("text") else text.replace("[TOOL_CALLS]", "").replace("<tool_call>", "")
    content = content if kind.endswith("text") else content.replace("</tool_call>", "")
    expected = {"role": "assistant", "content": content}
    assert without_ids(live.chat(**ASK)["choices"][0]) == (expected, "stop")
    assert joined(live.chunks(PATH, ASK)) == (expected, "stop")
    whole = live.chat(**ASK, skip_special_tokens=False)["choices"][0]
    assert whole["message"]["content"] == text


def test_a_call_that_is_cut_off(say: Say, kind: str) -> None:
    """By the token limit after its name: it is there as far as it goes, and the reason is the limit's."""
    text = written(kind, ("get_weather", PARIS), ("time", "{}"))
    live = say(text)
    for limit in range(1, len(text) + 2, 3):
        body = ASK | {"max_tokens": limit}
        whole = without_ids(live.chat(**body)["choices"][0])
        assert joined(live.chunks(PATH, body)) == whole
        message, reason = whole
        if reason == "length":
            for made in message.get("tool_calls", []):
                assert PARIS.startswith(made["function"]["arguments"]) or made["function"]["name"] == "time"
        else:
            assert (reason, len(message["tool_calls"])) == ("tool_calls", 2)


def test_tools_that_are_not_offered_are_text(say: Say, kind: str, kind_tokenizer: Tokenizer) -> None:
    text = written(kind, ("get_weather", PARIS))
    live = say(text)
    shown = kind_tokenizer.decode(kind_tokenizer.encode(text, add_special_tokens=False))
    bodies: list[dict[str, Any]] = [{}, {"tools": None}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}]
    for body in bodies:
        choice = live.chat(messages=[USER], **body)["choices"][0]
        assert without_ids(choice) == ({"role": "assistant", "content": shown}, "stop")
        assert "get_weather" not in prompt(live, kind_tokenizer)
        assert joined(live.chunks(PATH, {"messages": [USER], **body}))[0]["content"] == shown


def test_the_model_is_told_of_the_tools(say: Say, kind_tokenizer: Tokenizer) -> None:
    live = say("Hm.")
    live.chat(**ASK)
    told = prompt(live, kind_tokenizer)
    assert '"name": "get_weather", "description": "Says the weather."' in told
    assert '"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}' in told
    assert '"strict"' not in told


def test_calls_and_answers_go_back_in(say: Say, kind: str, kind_tokenizer: Tokenizer) -> None:
    """As the official client gives back what it got."""
    live = say(written(kind, ("get_weather", PARIS), ("time", "{}")), "It is warm.")
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        tools: Any = [TOOL, OTHER]
        messages: list[Any] = [USER]
        message = client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0].message
        assert message.tool_calls is not None
        messages.append(message)
        for made in message.tool_calls:
            assert made.type == "function"
            result = f"of {made.function.name}"
            messages.append({"role": "tool", "tool_call_id": made.id, "content": [{"type": "text", "text": result}]})
        last = client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0]
    assert (last.message.content, last.message.tool_calls, last.finish_reason) == ("It is warm.", None, "stop")
    told = prompt(live, kind_tokenizer)
    assert '"arguments": {"city": "Paris"}' in told
    for text in ("How warm is it?", "of get_weather", "of time"):
        assert text in told


def test_the_official_clients_stream(say: Say, kind: str) -> None:
    live = say("Well.\n" + written(kind, ("get_weather", PARIS), ("time", "{}")))
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        tools: Any = [TOOL, OTHER]
        messages: Any = [USER]
        with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
            seen = [event.type for event in stream]
            completion = stream.get_final_completion()
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well.\n"
    assert choice.message.tool_calls is not None
    assert [(made.function.name, made.function.arguments) for made in choice.message.tool_calls] == [
        ("get_weather", PARIS),
        ("time", "{}"),
    ]
    assert len({made.id for made in choice.message.tool_calls}) == 2
    assert "tool_calls.function.arguments.delta" in seen


def test_choices_are_apart(say: Say, kind: str) -> None:
    live = say(written(kind, ("time", "{}")), "No.", written(kind, ("get_weather", PARIS)))
    body = ASK | {"n": 3}
    whole = [without_ids(choice) for choice in live.chat(**body)["choices"]]
    assert [reason for _, reason in whole] == ["tool_calls", "stop", "tool_calls"]
    chunks = live.chunks(PATH, body)
    assert [joined(chunks, index) for index in range(3)] == whole


def test_logprobs_list_every_token_and_usage_counts_them(say: Say, kind: str, kind_tokenizer: Tokenizer) -> None:
    text = "So <too" + written(kind, ("get_weather", PARIS))
    ids = kind_tokenizer.encode(text, add_special_tokens=False)
    live = say(text)
    body = ASK | {"logprobs": True, "routing": True, "routing_prompt": True}
    whole = live.chat(**body)
    listed = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert listed == [kind_tokenizer.token_text(token_id) for token_id in ids]
    assert whole["usage"]["completion_tokens"] == len(ids) + 1
    assert len(whole["choices"][0]["routing"]["tokens"]) == len(ids) + 1
    chunks = [chunk["choices"][0] for chunk in live.chunks(PATH, body)]
    parts = [choice["logprobs"]["content"] for choice in chunks if choice["logprobs"]]
    assert [entry["token"] for part in parts for entry in part] == listed
    routing = [choice.get("routing", {}) for choice in chunks]
    assert sum(len(part.get("tokens", ())) for part in routing) == len(ids) + 1
    assert sum("prompt" in part for part in routing) == 1


@pytest.mark.parametrize(
    ("stop", "content", "calls", "reason"),
    [
        ("see", "Let me ", [], "stop"),
        ('"city"', "Let me see.", [call("get_weather", "{")], "stop"),
        ("is", "Let me see.", [call("get_weather", '{"city": "Par')], "stop"),
        ("absent", "Let me see.", [call("get_weather", PARIS)], "tool_calls"),
        ("}}", "Let me see.", [call("get_weather", PARIS[:-1])], "stop"),
    ],
)
def test_stop_strings(say: Say, kind: str, stop: str, content: str, calls: list[Any], reason: str) -> None:
    live = say("Let me see." + written(kind, ("get_weather", PARIS)))
    body = ASK | {"stop": stop}
    expected = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
    assert without_ids(live.chat(**body)["choices"][0]) == (expected, reason)
    assert joined(live.chunks(PATH, body)) == (expected, reason)


def test_random_texts_stream_as_they_are_returned(say: Say) -> None:
    chance = random.Random(1)
    fragments = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        '{"name": "time", "arguments": {',
        "}}",
        "é 🦜",
        " ",
        "a",
    ]
    for _ in range(15):
        live = say("".join(chance.choices(fragments, k=chance.randrange(1, 10))))
        body = ASK | {"stop": chance.choice([None, "}}", "é", " a"]), "logprobs": chance.random() < 0.5}
        assert joined(live.chunks(PATH, body)) == without_ids(live.chat(**body)["choices"][0])


def grammar_of(live: Live) -> str | None:
    request: Request = live.call(lambda: live.engine.requests[-1])
    return request.grammar


def test_what_is_demanded_is_enforced_by_a_grammar(say: Say, kind: str) -> None:
    live = say(written(kind, ("get_weather", PARIS)))

    def asked(**body: Any) -> str | None:
        assert live.chat(**ASK | body)["choices"][0]["finish_reason"] == "tool_calls"
        return grammar_of(live)

    assert asked() is None
    assert asked(tool_choice="auto", parallel_tool_calls=True) is None
    several = asked(tool_choice="required")
    one = asked(tool_choice="required", parallel_tool_calls=False)
    named = asked(tool_choice={"type": "function", "function": {"name": "time"}})
    free = asked(parallel_tool_calls=False)
    json_or_calls = asked(response_format={"type": "json_object"})
    grammars = [several, one, named, free, json_or_calls]
    assert len(set(grammars)) == 5
    assert all(grammar is not None and "start: " in grammar for grammar in grammars)
    assert named is not None
    assert "get_weather" not in named
    assert asked(tool_choice="required", response_format={"type": "json_object"}) == several
    assert json_or_calls is not None
    assert "Paris" not in json_or_calls


def test_a_template_without_tools(tokenizer: Tokenizer) -> None:
    """Mixtral's: the tools are told in words, and several answers and the next question are one user turn."""
    text = 'I look.\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    answer = tokenizer.encode(text, add_special_tokens=False)
    info = fake_info(max_model_len=8192, num_blocks=10_000)
    with live_server(lambda: FakeEngine(lambda _: answer, info=info), tokenizer) as live:
        first = live.chat(**ASK)["choices"][0]
        expected = {"role": "assistant", "content": "I look.\n", "tool_calls": [call("time", "{}")]}
        assert without_ids(first) == (expected, "tool_calls")
        assert joined(live.chunks(PATH, ASK)) == (expected, "tool_calls")
        made = first["message"]["tool_calls"][0]
        back = [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [made, made | {"id": "2"}]},
            {"role": "tool", "tool_call_id": made["id"], "content": "noon"},
            {"role": "tool", "tool_call_id": "2", "content": "</s>"},
            {"role": "user", "content": "So?"},
        ]
        live.chat(**ASK | {"messages": back})
        told = prompt(live, tokenizer)
        assert told.startswith("<s> [INST] Be brief.\n\n# Tools\n")
        assert told.endswith(
            "[INST] <tool_response>\nnoon\n</tool_response>\n<tool_response>\n</s>\n</tool_response>\nSo? [/INST]"
        )
        ids = live.call(lambda: live.engine.requests[-1].prompt_ids)
        assert ids.count(2) == 1, "the </s> of the tool's answer is text"
        assert json.dumps(TOOL, ensure_ascii=False) in told
