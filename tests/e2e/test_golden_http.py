"""The golden answers through HTTP, and streamed text against whole text, with the official client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from tests.e2e.running import Server
from tests.golden_cases import GOLDEN, GoldenCase

pytestmark = pytest.mark.demo
MODEL = "mixserve-demo"
TOKENIZER_CASES = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_tokenizer.json").read_text("utf-8"))


def arguments(case: GoldenCase) -> dict[str, Any]:
    return {"model": MODEL, "prompt": case.prompt_ids, "temperature": 0, "max_tokens": 48, "logprobs": 0}


def check(case: GoldenCase, completion: Completion) -> None:
    choice = completion.choices[0]
    stopped = len(case.output_ids) < 48 or case.output_ids[-1] == 2
    assert choice.text == case.text
    assert choice.finish_reason == ("stop" if stopped else "length")
    assert choice.logprobs is not None
    # The end-of-sequence token counts in usage and is left out of the log probabilities.
    expected = case.logprobs[:-1] if stopped else case.logprobs
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=2e-3)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(case.prompt_ids)
    assert completion.usage.completion_tokens == len(case.output_ids)


@pytest.fixture(scope="module")
def client(demo_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.prompt[:24])
def test_one_at_a_time(client: openai.OpenAI, case: GoldenCase) -> None:
    check(case, client.completions.create(**arguments(case)))


def test_all_sixteen_at_once(demo_server: Server) -> None:
    async def run() -> list[Completion]:
        async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.completions.create(**arguments(case)) for case in GOLDEN))

    for case, completion in zip(GOLDEN, asyncio.run(run()), strict=True):
        check(case, completion)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_paris(client: openai.OpenAI, stream: bool) -> None:
    case = GOLDEN[0]
    messages: Any = [{"role": "user", "content": case.prompt}]
    if not stream:
        answer = client.chat.completions.create(model=MODEL, messages=messages)  # the demo's default is greedy
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (case.text, "stop")
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)
        return
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == case.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_async_streams_side_by_side(demo_server: Server) -> None:
    """Every chat case streamed at once equals its golden text."""
    chats = [case for case in GOLDEN if case.kind == "chat"]

    async def one(client: openai.AsyncOpenAI, case: GoldenCase) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": case.prompt}],
            temperature=0,
            max_tokens=48,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, case) for case in chats))

    assert asyncio.run(run()) == [case.text for case in chats]


@pytest.mark.parametrize(
    "case",
    [c for c in TOKENIZER_CASES["texts"] if any(ord(char) > 0x2E7F for char in c["text"])][:12],
    ids=lambda case: ascii(case["text"])[:20],
)
def test_streamed_text_equals_whole_text(client: openai.OpenAI, case: dict[str, Any]) -> None:
    """The output is forced to the tokens of emoji and Chinese strings, which split characters in every way."""
    forced: Any = {
        "model": MODEL,
        "prompt": case["text"],
        "max_tokens": 24,
        "seed": 5,
        "temperature": 1,
        "logit_bias": {str(token): 100 for token in case["ids"]},
    }
    whole = client.completions.create(**forced)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**forced, stream=True)]
    assert whole.choices[0].text == "".join(pieces)
    assert whole.choices[0].text.strip() != ""
    assert all(piece for piece in pieces[:-1]), "no empty chunks but the last"
    # A replacement character in the middle would be half a character sent too early: the whole text has as many.
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.choices[0].text.count("\ufffd")


def test_a_shared_prefix_of_1000_tokens_is_computed_once(demo_server: Server) -> None:
    prompt = list(range(1000, 2000))
    before = demo_server.metric("mixserve_prefix_cache_hits_total")
    texts, cached = [], []
    for salt in ("one", "one", "two"):
        body = {"model": MODEL, "prompt": [*prompt, 5, 6, 7], "temperature": 0, "max_tokens": 6, "cache_salt": salt}
        answer = httpx.post(f"{demo_server.url}/v1/completions", json=body, timeout=120).json()
        texts.append(answer["choices"][0]["text"])
        cached.append((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))
    assert texts[0] == texts[1] == texts[2]
    assert cached == [0, 992, 0]  # 62 whole blocks of 16
    assert demo_server.metric("mixserve_prefix_cache_hits_total") - before == 992
