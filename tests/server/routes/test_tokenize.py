"""POST /tokenize and /detokenize."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.text import Tokenizer
from tests.server.conftest import MIXTRAL
from tests.server.fake_engine import VOCAB_SIZE, FakeEngine
from tests.server.harness import MODEL, Live, error_of, live_server

TEXTS = ["Hi", "  two\n\nlines ", "héé €𝄞", "\x00", "[INST] a [/INST]", "x" * 1001]
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def tokenize(server: Live, **body: Any) -> dict[str, Any]:
    response = server.post("/tokenize", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer.keys() == {"count", "max_model_len", "tokens", "token_strs"}
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == server.engine.info.max_model_len
    return answer


def detokenize(server: Live, ids: list[int]) -> str:
    response = server.post("/detokenize", {"tokens": ids})
    assert response.status_code == 200, response.text
    assert response.json().keys() == {"prompt"}
    text: str = response.json()["prompt"]
    return text


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_a_text_is_what_a_completion_reads(server: Live, tokenizer: Tokenizer, text: str) -> None:
    answer = tokenize(server, prompt=text, model=MODEL)
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["token_strs"] is None
    if 0 < len(text) < 100:
        server.complete(prompt=text, max_tokens=1)
        assert tuple(answer["tokens"]) == server.engine.requests[-1].prompt_ids
    assert tokenize(server, prompt=text, add_special_tokens=True)["tokens"] == answer["tokens"]
    assert [1, *tokenize(server, prompt=text, add_special_tokens=False)["tokens"]] == answer["tokens"]


@pytest.mark.parametrize("text", TEXTS)
def test_and_back(server: Live, text: str) -> None:
    assert detokenize(server, tokenize(server, prompt=text, add_special_tokens=False)["tokens"]) == text


def test_random_texts_come_back(server: Live) -> None:
    draw = random.Random(4)
    letters = "ab \n\t.é€𝄞日\u0301\u200d<>0"
    for _ in range(50):
        text = "".join(draw.choices(letters, k=draw.randint(1, 40)))
        assert detokenize(server, tokenize(server, prompt=text, add_special_tokens=False)["tokens"]) == text


def test_a_chat_is_what_the_chat_route_reads(server: Live) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "</s> a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = tokenize(server, messages=messages)
    server.chat(messages=messages, max_tokens=1)
    assert tuple(answer["tokens"]) == server.engine.requests[-1].prompt_ids
    assert answer["tokens"].count(2) == 1, "what a user writes is no control token"
    assert tokenize(server, messages=messages, prompt=None, add_special_tokens=False)["tokens"] == answer["tokens"]


def test_the_generation_prompt_can_be_left_out() -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}go{% endif %}"
    own = Tokenizer.load(MIXTRAL, chat_template=template)
    with live_server(lambda: FakeEngine(lambda _: []), own) as live:
        whole = tokenize(live, messages=MESSAGES)["tokens"]
        assert whole == tokenize(live, messages=MESSAGES, add_generation_prompt=True)["tokens"]
        assert detokenize(live, whole) == "<Hi>go"
        closed = tokenize(live, messages=MESSAGES, add_generation_prompt=False)["tokens"]
        assert detokenize(live, closed) == "<Hi>"


def test_the_model_is_told_of_tools_as_in_a_chat(server: Live) -> None:
    answer = tokenize(server, messages=MESSAGES, tools=TOOLS, return_token_strs=True)
    server.chat(messages=MESSAGES, tools=TOOLS, max_tokens=1)
    assert tuple(answer["tokens"]) == server.engine.requests[-1].prompt_ids
    assert "get_weather" in "".join(answer["token_strs"])
    assert tokenize(server, messages=MESSAGES, tools=[])["tokens"] == tokenize(server, messages=MESSAGES)["tokens"]


def test_token_strings_are_the_vocabulary_s_own(server: Live) -> None:
    answer = tokenize(server, prompt="Hello\nworld", return_token_strs=True)
    assert answer["token_strs"] == ["<s>", "▁Hello", "<0x0A>", "world"]


def test_control_tokens_and_half_characters_are_shown(server: Live) -> None:
    assert detokenize(server, [1, 22557, 2]) == "<s> Hello</s>"
    assert detokenize(server, [243]) == "\ufffd"
    assert detokenize(server, []) == ""
    assert detokenize(server, [VOCAB_SIZE - 1]) != ""


NULLS = {
    "model": None,
    "add_special_tokens": None,
    "add_generation_prompt": None,
    "return_token_strs": None,
    "tools": None,
}


def test_null_means_absent_and_unknown_fields_are_ignored(server: Live) -> None:
    assert tokenize(server, prompt="Hi", messages=None, chat_template=None, unknown=[1], **NULLS)["count"] == 2
    assert tokenize(server, prompt=None, messages=MESSAGES, **NULLS)["count"] > 2
    assert server.post("/detokenize", {"tokens": [22557], "model": None, "unknown": {}}).json() == {"prompt": "Hello"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None, "messages": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["Hi"]}, "prompt"),
        ({"prompt": [1]}, "prompt"),
        ({"prompt": "Hi", "messages": MESSAGES}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"prompt": "Hi", "add_special_tokens": 1}, "add_special_tokens"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "Hi", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": MESSAGES, "add_generation_prompt": "yes"}, "add_generation_prompt"),
        ({"prompt": "Hi", "tools": TOOLS}, "tools"),
        ({"messages": MESSAGES, "tools": TOOLS * 2}, "tools"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "Hi", "return_token_strs": "true"}, "return_token_strs"),
        ({"prompt": "Hi", "chat_template": "x"}, "chat_template"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ({"prompt": "Hi", "model": 5}, "model"),
    ],
)
def test_what_is_no_text_and_no_chat(server: Live, body: dict[str, Any], param: str) -> None:
    error = error_of(server.post("/tokenize", body), 400)
    assert error["param"] == param
    assert param in error["message"]


def test_an_order_of_roles_that_the_template_refuses(server: Live) -> None:
    error = error_of(server.post("/tokenize", {"messages": [{"role": "assistant", "content": "Hi"}]}), 400)
    assert error["param"] == "messages"
    assert "alternate" in error["message"]


@pytest.mark.parametrize(
    "tokens", [None, 5, "5", ["5"], [1.5], [True], [None], [[1]], [-1], [VOCAB_SIZE], [1, 2**63], [10**40]]
)
def test_what_are_no_token_ids(server: Live, tokens: Any) -> None:
    error = error_of(server.post("/detokenize", {"tokens": tokens}), 400)
    assert error["param"] == "tokens"
    assert "tokens" in error["message"]


def test_a_missing_list_of_tokens(server: Live) -> None:
    assert error_of(server.post("/detokenize", {}), 400)["param"] == "tokens"


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [5]})])
def test_bodies_models_and_methods(server: Live, path: str, body: dict[str, Any]) -> None:
    assert error_of(server.post(path, body | {"model": "../x"}), 404)["code"] == "model_not_found"
    assert error_of(server.client.post(path, content=b"{", headers={"Content-Type": "application/json"}), 400)
    assert error_of(server.client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    assert error_of(server.post(path, [body]), 400)["param"] is None
    error_of(server.client.get(path), 405)


def test_neither_needs_the_engine(server: Live) -> None:
    def leave() -> None:
        server.service.draining = True
        server.engine.silent = True

    def stay() -> None:
        server.service.draining = False
        server.engine.silent = False

    server.call(leave)
    try:
        assert tokenize(server, prompt="Hi")["count"] == 2
        assert detokenize(server, [22557]) == "Hello"
        error_of(server.post("/v1/completions", {"prompt": "Hi"}), 503)
    finally:
        server.call(stay)


def test_a_long_text_holds_nobody_up(server: Live) -> None:
    """Others are answered while 1.5 MB are encoded, and decoded again."""
    text = "The quick brown fox. " * 70_000

    def answered_meanwhile(work: Callable[[], None]) -> int:
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.05)  # for it to reach the server first
        count = 0
        while thread.is_alive():
            assert server.client.get("/version").status_code == 200
            count += 1
        return count

    ids: list[int] = []
    texts: list[str] = []
    assert answered_meanwhile(lambda: ids.extend(tokenize(server, prompt=text)["tokens"])) >= 5
    assert answered_meanwhile(lambda: texts.append(detokenize(server, ids[1:]))) >= 5
    assert texts == [text]
