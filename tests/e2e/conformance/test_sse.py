"""API.md: "SSE: `data: {json}`, ends with `data: [DONE]`; `text/event-stream` ..."."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conformance.asking import MODEL
from tests.e2e.running import Server

COMPLETIONS = ("/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 5})
CHAT = ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})
BOTH = pytest.mark.parametrize(("path", "body"), [COMPLETIONS, CHAT], ids=["completions", "chat"])


def stream(server: Server, path: str, body: dict[str, Any], **fields: Any) -> httpx.Response:
    response = httpx.post(f"{server.url}{path}", json=body | {"stream": True} | fields, timeout=30)
    assert response.status_code == 200, response.text
    return response


def chunks(server: Server, path: str, body: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    events = stream(server, path, body, **fields).text.split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@BOTH
def test_events_are_data_and_json_and_the_last_is_done(server: Server, path: str, body: dict[str, Any]) -> None:
    response = stream(server, path, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    for event in events:
        assert event.startswith(b"data: {")
        assert b"\n" not in event
        json.loads(event.removeprefix(b"data: "))


@BOTH
def test_one_id_and_created_for_all_chunks(server: Server, path: str, body: dict[str, Any]) -> None:
    first, second = chunks(server, path, body, n=2), chunks(server, path, body)
    assert len(first) > 3
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in first}) == 1
    assert first[0]["id"] != second[0]["id"]


def test_the_first_chat_chunk_of_each_choice_carries_the_role(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    roles: dict[int, list[str | None]] = {0: [], 1: [], 2: []}
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, n=3, stream=True):
        roles[chunk.choices[0].index].append(chunk.choices[0].delta.role)
    for found in roles.values():
        assert found[0] == "assistant"
        assert set(found[1:]) == {None}


@BOTH
def test_with_include_usage_every_chunk_has_null_and_one_more_has_it(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    *before, last = chunks(server, path, body, stream_options={"include_usage": True}, ignore_eos=True)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert {**last["usage"]}.keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}


@BOTH
@pytest.mark.parametrize("options", [None, {"include_usage": False}, {}])
def test_without_include_usage_no_chunk_has_usage(
    server: Server, path: str, body: dict[str, Any], options: dict[str, Any] | None
) -> None:
    assert all("usage" not in chunk for chunk in chunks(server, path, body, stream_options=options))


def test_the_client_reads_usage_from_the_last_chunk(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *before, last = list(stream)
    assert all(chunk.usage is None for chunk in before)
    assert (last.choices, last.usage is not None) == ([], True)
