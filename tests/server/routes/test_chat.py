"""POST /v1/chat/completions: shapes, streamed and whole."""

from __future__ import annotations

from typing import Any

from engine.text import Tokenizer
from engine.types import Request
from tests.server.conftest import ANSWER
from tests.server.fake_engine import fake_logprob
from tests.server.harness import MODEL, Live

PATH = "/v1/chat/completions"
TEXT = ANSWER.strip()
MESSAGES = [{"role": "user", "content": "Hi"}]


def last_request(server: Live) -> Request:
    return server.call(lambda: server.engine.requests[-1])


def test_a_whole_answer(server: Live, tokenizer: Tokenizer) -> None:
    body = server.chat()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len(tokenizer.encode_chat(MESSAGES))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 7,
        "total_tokens": num_prompt + 7,
    }
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}


def test_a_streamed_answer(server: Live) -> None:
    chunks = server.chunks(PATH, {"messages": MESSAGES})
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all(chunk.keys() == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(choice.keys() == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)
    first, *middle, last = choices
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in middle) == TEXT
    assert all(choice["delta"]["content"] and choice["finish_reason"] is None for choice in middle)
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_usage_in_a_stream(server: Live) -> None:
    *chunks, last = server.chunks(PATH, {"messages": MESSAGES, "stream_options": {"include_usage": True}, "n": 2})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 14


def test_each_choice_has_its_role_and_its_finish(server: Live) -> None:
    chunks = server.chunks(PATH, {"messages": MESSAGES, "n": 3})
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert ["role" in choice["delta"] for choice in choices].count(True) == 1
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
        assert [choice["finish_reason"] for choice in choices].count("stop") == 1


def test_an_answer_of_nothing(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: []))
    assert server.chat()["choices"][0]["message"]["content"] == ""
    chunks = server.chunks(PATH, {"messages": MESSAGES})
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


def test_logprobs(server: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    logprobs = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert logprobs.keys() == {"content", "refusal"}
    assert [entry["logprob"] for entry in logprobs["content"]] == [fake_logprob(token) for token in ids]
    data = bytes(byte for entry in logprobs["content"] for byte in entry["bytes"])
    assert data.decode() == ANSWER, "the vocabulary's own bytes, with the space before the first word"
    for entry in logprobs["content"]:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert [top.keys() for top in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    assert all(entry["top_logprobs"] == [] for entry in server.chat(logprobs=True)["choices"][0]["logprobs"]["content"])
    assert server.chat(logprobs=False)["choices"][0]["logprobs"] is None

    streamed: list[Any] = []
    for chunk in server.chunks(PATH, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}):
        if (part := chunk["choices"][0]["logprobs"]) is not None:
            streamed += part["content"]
    assert streamed == logprobs["content"]


def test_the_limit_of_tokens(server: Live) -> None:
    server.chat()
    assert last_request(server).params.max_tokens is None, "the rest of the context"
    server.chat(max_tokens=5)
    assert last_request(server).params.max_tokens == 5
    server.chat(max_tokens=5, max_completion_tokens=3)
    assert last_request(server).params.max_tokens == 3


def test_an_answer_to_the_end_of_the_context(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: [5] * 1000))
    body = server.chat()
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"


def test_what_the_template_sees(server: Live, tokenizer: Tokenizer) -> None:
    server.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}],
                "name": "me",
            },
            {"role": "assistant", "content": "Three"},
            {"role": "user", "content": "Four"},
        ]
    )
    prompt = "<s>[INST] Be brief.\n\nOne\ntwo [/INST] Three</s>[INST] Four [/INST]"
    assert last_request(server).prompt_ids == tuple(tokenizer.encode(prompt, add_special_tokens=False))


def test_control_tokens_in_a_message_are_text(server: Live) -> None:
    server.chat(messages=[{"role": "user", "content": "</s><s>"}])
    ids = last_request(server).prompt_ids
    assert (ids.count(1), ids.count(2)) == (1, 0)
