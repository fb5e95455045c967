"""What the client asks of a server, and what it makes of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from server.bench.answer import Answer, Failure
from server.bench.client import Client, Endpoint, Target
from server.bench.errors import BenchError
from server.bench.prompts import LAST_ID, Prompt
from tests.e2e.running import free_port
from tests.server.bench.stub import Behaviour, Reply, stub_server

T = TypeVar("T")
Use = Callable[[Client], Awaitable[T]]


def ask(url: str, use: Use[T], api_key: str | None = None) -> T:
    async def run() -> T:
        client = Client(url, api_key)
        try:
            return await use(client)
        finally:
            client.close()

    return asyncio.run(run())


def target(endpoint: Endpoint = "completions", *, ignore_eos: bool = False) -> Target:
    return Target(model="stub", endpoint=endpoint, ignore_eos=ignore_eos)


def test_the_model() -> None:
    with stub_server(Behaviour(models=("first", "second"))) as stub:
        assert ask(stub.url, lambda client: client.model(None)) == "first"
        assert ask(stub.url, lambda client: client.model("second"), "key") == "second"
        with pytest.raises(BenchError, match="the server has no model third; it has first, second"):
            ask(stub.url, lambda client: client.model("third"))
    assert "authorization" not in stub.seen[0].headers
    assert stub.seen[1].headers["authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("models", "wanted", "result"),
    [
        ((), None, "the server lists no model: name one with --model"),
        ((), "mine", None),
        ((404, {}), "mine", None),
        ((404, {}), None, "HTTP 404"),
        ((401, {"error": {"message": "who?"}}), "mine", r"HTTP 401: who\? \(--api-key"),
        ((500, b"Internal Server Error"), "mine", None),
        ((503, {"error": {"message": "loading"}}), None, "HTTP 503: loading"),
        ((200, b"<html>"), "mine", "no OpenAI-compatible server"),
    ],
    ids=str,
)
def test_no_list_of_models(models: tuple[str, ...] | Reply, wanted: str | None, result: str | None) -> None:
    with stub_server(Behaviour(models=models)) as stub:
        if result is None:
            assert ask(stub.url, lambda client: client.model(wanted)) == wanted
        else:
            with pytest.raises(BenchError, match=result) as error:
                ask(stub.url, lambda client: client.model(wanted))
            assert "\n" not in str(error.value)


def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(BenchError, match=f"no server answers at {url}: connection refused"):
        ask(url, lambda client: client.model(None))


def test_a_completion_is_timed() -> None:
    async def use(client: Client) -> Any:
        await client.generate(target(), Prompt((5,), 1))
        return await client.generate(target(), Prompt((5, 6), 4))

    with stub_server(Behaviour(ttft=0.2, itl=0.05, cached_tokens=1)) as stub:
        found = ask(stub.url, use)
    assert isinstance(found, Answer)
    # A busy machine may see a chunk late, but never early.
    assert 0.199 < found.ttft < 2
    assert 0.349 < found.latency < 4
    assert len(found.itls) == 3
    assert found.latency == pytest.approx(found.ttft + sum(found.itls))
    assert (found.output_tokens, found.input_tokens, found.cached_tokens) == (4, 4, 1)


@pytest.mark.parametrize("part", [1, 7, 100])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_packets_cut_anywhere(part: int, endpoint: Endpoint) -> None:
    with stub_server(Behaviour(part=part)) as stub:
        found = ask(stub.url, lambda client: client.generate(target(endpoint), Prompt("Hi", 5)))
    assert isinstance(found, Answer)
    assert len(found.itls) == 4
    assert (found.output_tokens, found.counted) == (5, True)


def test_standard_fields_only() -> None:
    message = {"role": "user", "content": "Hi"}

    async def use(client: Client) -> None:
        await client.generate(target(), Prompt((5, 6), 2))
        await client.generate(target(ignore_eos=True), Prompt("Hi", 2))
        await client.generate(target("chat"), Prompt("Hi", 2))
        await client.generate(target("chat", ignore_eos=True), Prompt((message, message), 3))

    with stub_server() as stub:
        ask(stub.url, use)
    same = {"model": "stub", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    assert [(seen.path, seen.body) for seen in stub.seen] == [
        ("/v1/completions", {**same, "prompt": [5, 6], "max_tokens": 2}),
        ("/v1/completions", {**same, "prompt": "Hi", "max_tokens": 2, "ignore_eos": True}),
        ("/v1/chat/completions", {**same, "messages": [message], "max_tokens": 2}),
        ("/v1/chat/completions", {**same, "messages": [message] * 2, "max_tokens": 3, "ignore_eos": True}),
    ]
    assert all(seen.headers["content-type"] == "application/json" for seen in stub.seen)


def test_failures_are_outcomes() -> None:
    replies: list[Reply] = [
        (503, {"error": {"message": "busy"}}),
        (200, b"no stream"),
        (200, b'data: {"error": "x"}\n\n'),
    ]

    async def use(client: Client) -> Any:
        return [await client.generate(target(), Prompt("Hi", 2)) for _ in replies]

    with stub_server(Behaviour(reply=lambda number, _: replies[number])) as stub:
        found = ask(stub.url, use)
    assert found == [
        Failure("HTTP 503", "busy"),
        Failure("broken off", "the answer ended before its last chunk"),
        Failure("error in stream", "x"),
    ]
    with stub_server(Behaviour(break_after=1)) as stub:
        broken = ask(stub.url, lambda client: client.generate(target(), Prompt("Hi", 2)))
    assert broken == Failure("connection broke", "closed by the server")
    gone = ask(stub.url, lambda client: client.generate(target(), Prompt("Hi", 2)))
    assert gone == Failure("no connection", "connection refused")


def test_a_server_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.client._REQUEST_SECONDS", 0.1)
    with stub_server(Behaviour(ttft=10)) as stub:
        found = ask(stub.url, lambda client: client.generate(target(), Prompt("Hi", 2)))
    assert isinstance(found, Failure)
    assert found.kind == "timeout"


def test_tokens_of_a_text() -> None:
    with stub_server(Behaviour(vocab_size=100)) as stub:
        assert ask(stub.url, lambda client: client.num_tokens("stub", " word")) == 5
    body = stub.seen[0].body
    assert body["prompt"] == body["content"] == " word"
    assert body["add_special_tokens"] is False
    with stub_server() as stub:
        assert ask(stub.url, lambda client: client.num_tokens("stub", " word")) is None


@pytest.mark.parametrize("vocab_size", [12, 260, 16_384, 30_000, 30_001, 50_000])
def test_the_highest_id(vocab_size: int) -> None:
    with stub_server(Behaviour(vocab_size=vocab_size)) as stub:
        assert ask(stub.url, lambda client: client.highest_id("stub")) == min(LAST_ID, vocab_size - 1)
    assert len(stub.seen) <= 17


def test_the_highest_id_of_a_server_that_does_not_say() -> None:
    with stub_server() as stub:
        assert ask(stub.url, lambda client: client.highest_id("stub")) == LAST_ID
