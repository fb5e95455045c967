"""The official client of OpenAI cannot tell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import ANSWER
from tests.server.harness import MODEL, Live

TEXT = ANSWER.strip()


@pytest.fixture
def client(server: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions(client: OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="Hi", logprobs=1)
    assert completion.choices[0].text == ANSWER
    assert completion.choices[0].logprobs is not None
    assert completion.usage is not None
    assert completion.usage.total_tokens == 9


def test_streamed_completions(client: OpenAI) -> None:
    with client.completions.create(model=MODEL, prompt="Hi", stream=True, n=2) as stream:
        texts = ["", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [ANSWER, ANSWER]


def test_chat(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2, temperature=0
    )
    choice = completion.choices[0]
    assert choice.message.content == TEXT
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_streamed_chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_the_stream_helper(client: OpenAI) -> None:
    """It accumulates chunks by the client's own rules and ends with a whole completion."""
    messages = [{"role": "user", "content": "Hi"}]
    with client.chat.completions.stream(model=MODEL, messages=messages, logprobs=True) as stream:  # type: ignore[arg-type]
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == TEXT
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.content is not None
    assert len(completion.choices[0].logprobs.content) == 6


def test_the_async_client(server: Live) -> None:
    async def one(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert await asyncio.gather(*(one(client) for _ in range(20))) == [TEXT] * 20
            completion = await client.completions.create(model=MODEL, prompt=[[5, 6], [7]])
            assert [choice.text for choice in completion.choices] == [ANSWER, ANSWER]

    asyncio.run(main())


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors(client: OpenAI, server: Live) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="Hi", temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == ("temperature", None, "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 300)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="Hi")
    assert missing.value.code == "model_not_found"
    server.call(lambda: setattr(server.engine, "fail_at", 2))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="Hi")
    with pytest.raises(openai.APIError, match="failed inside the engine"):
        list(client.completions.create(model=MODEL, prompt="Hi", stream=True))
