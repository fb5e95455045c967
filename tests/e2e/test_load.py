"""Many streams at once on the real model: no error, and what it cost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.running import running_server

pytestmark = pytest.mark.demo
STREAMS, TOKENS = 64, 64


def test_64_streams_of_64_tokens(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del demo_checkpoint  # built before the clock of the server's start runs

    async def one(client: openai.AsyncOpenAI, number: int) -> int:
        stream = await client.chat.completions.create(
            model="mixserve-demo",
            messages=[{"role": "user", "content": f"Tell me story number {number}."}],
            max_tokens=TOKENS,
            temperature=1,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "seed": number},
        )
        tokens = 0
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        return tokens

    async def run(url: str) -> tuple[list[int], float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            start = time.monotonic()
            counts = await asyncio.gather(*(one(client, number) for number in range(STREAMS)))
            return counts, time.monotonic() - start

    with running_server("--max-model-len", "2048") as server:
        counts, seconds = asyncio.run(run(server.url))
        peak = server.metric("mixserve_engine_peak_memory_bytes")
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.wait_for_metric("mixserve_kv_cache_usage_perc", 0, seconds=1)
    assert counts == [TOKENS] * STREAMS
    with capsys.disabled():
        print(f"\n{STREAMS} streams: {sum(counts) / seconds:.0f} tokens/s, peak engine memory {peak / 1e9:.2f} GB")
