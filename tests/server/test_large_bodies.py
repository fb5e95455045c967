"""Bodies of nearly 2 MiB that are wrong a hundred thousand times: each gets its 400 soon, and holds nobody up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.server.harness import Live, error_of

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
USER = [{"role": "user", "content": "Hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
NUM_BYTES = 2**21 - 1000
MAX_WAIT, MAX_HEALTH = 1.0, 0.25
"""Seconds: of the answer, and of /health meanwhile."""
NUM_TRIES = 3
"""One of them is in time: other tests share the cores."""


def many(item: Any) -> list[Any]:
    return [item] * (NUM_BYTES // (len(json.dumps(item, separators=(",", ":"))) + 1))


def calls(item: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": many(item)}]}


def keys(value: Any) -> dict[str, Any]:
    return {f"k{number}": value for number in range(160_000)}


# Made when they are used: together they would be a heap that slows every collection of garbage.
CASES: list[tuple[str, Callable[[], Any], str, str]] = [
    (CHAT, lambda: calls(0), "messages", "messages[0].tool_calls must have at most 128 items"),
    (CHAT, lambda: calls(CALL), "messages", "messages[0].tool_calls must have at most 128 items"),
    (
        CHAT,
        lambda: {"messages": [{"role": "assistant", "tool_calls": [0] * 128}] * 6000},
        "messages",
        "messages[0].tool_calls[0] must be an object",
    ),
    (TOKENIZE, lambda: calls(0), "messages", "messages[0].tool_calls must have at most 128 items"),
    (CHAT, lambda: {"messages": many(USER[0])}, "messages", "messages must have at most 16384 items"),
    (TOKENIZE, lambda: {"messages": many(USER[0])}, "messages", "messages must have at most 16384 items"),
    (CHAT, lambda: {"messages": [{"role": "user", "content": many(0)}]}, "messages", "messages[0].content[0] must be"),
    (CHAT, lambda: {"messages": USER, "tools": many(TOOL)}, "tools", "tools must have at most 128 items"),
    (CHAT, lambda: {"messages": USER, "stop": many("")}, "stop", "up to 4 strings"),
    (CHAT, lambda: {"messages": USER, "logit_bias": keys("")}, "logit_bias", "up to 300 token ids"),
    (CHAT, lambda: {"messages": USER, "expert_mask": keys(0)}, "expert_mask", "a list of forbidden expert ids"),
    (CHAT, lambda: {"messages": USER, "structured_outputs": keys(0)}, "structured_outputs", "and nothing else"),
    (
        CHAT,
        lambda: {"messages": USER, "structured_outputs": {"choice": many(0)}},
        "structured_outputs",
        "structured_outputs.choice must be a list of texts",
    ),
    (CHAT, lambda: {"messages": USER, "chat_template": "", **keys(0)}, "chat_template", "is not supported"),
    (COMPLETIONS, lambda: {"prompt": many([1])}, "prompt", "prompt must be one prompt or up to 128, not 52"),
    (COMPLETIONS, lambda: {"prompt": many("a")}, "prompt", "prompt must be one prompt or up to 128, not 52"),
]


class Health:
    """Asks for /health over and over."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._stop = threading.Event()
        self.longest = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            begin = time.monotonic()
            assert self._live.client.get("/health").status_code == 200
            self.longest = max(self.longest, time.monotonic() - begin)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)


def measured(live: Live, path: str, body: bytes) -> tuple[httpx2.Response, float, float]:
    """The answer, its seconds, and those of the slowest /health meanwhile."""
    health = Health(live)
    try:
        begin = time.monotonic()
        response = live.client.post(path, content=body, headers={"Content-Type": "application/json"})
        wait = time.monotonic() - begin
    finally:
        health.stop()
    return response, wait, health.longest


@pytest.mark.parametrize(("path", "make", "param", "words"), CASES)
def test_a_large_mistake_is_told_soon(server: Live, path: str, make: Callable[[], Any], param: str, words: str) -> None:
    body = json.dumps(make(), separators=(",", ":")).encode()
    assert 10**6 < len(body) < 2**21
    for _ in range(NUM_TRIES):
        response, wait, health = measured(server, path, body)
        if wait < MAX_WAIT and health < MAX_HEALTH:
            break
    assert wait < MAX_WAIT
    assert health < MAX_HEALTH
    error = error_of(response, 400)
    assert error["param"] == param
    assert words in error["message"]
