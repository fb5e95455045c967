"""Clients that leave, over real sockets: whatever they waited for, the engine is free again within a second."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Live, live_server

WITHIN_SECONDS = 1.0


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    """An engine that would take minutes for each answer."""
    with live_server(lambda: FakeEngine(lambda _: [5] * 10_000, step_seconds=0.02), tokenizer) as live:
        yield live


def send(live: Live, path: str, body: dict[str, Any]) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.sendall(head.encode() + content)
    return sock


def wait(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until `condition` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never came true"
        time.sleep(0.005)
    return time.monotonic() - start


def free(live: Live) -> bool:
    stats = live.call(lambda: live.engine.stats)
    idle = live.call(lambda: live.service.num_inflight == 0)
    return idle and stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def metric(live: Live, name: str) -> float:
    (line,) = [line for line in live.client.get("/metrics").text.splitlines() if line.startswith(f"mixserve_{name}{{")]
    return float(line.rpartition(" ")[2])


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES = [
    pytest.param("/v1/completions", {"prompt": "Hi", "max_tokens": 200, "stream": True}, 1, id="stream"),
    pytest.param("/v1/completions", {"prompt": "Hi", "max_tokens": 200}, 1, id="whole"),
    pytest.param(
        "/v1/completions", {"prompt": ["Hi", "You"], "n": 3, "max_tokens": 200, "stream": True}, 6, id="stream-n"
    ),
    pytest.param("/v1/completions", {"prompt": "Hi", "n": 4, "best_of": 5, "max_tokens": 200}, 5, id="whole-n"),
    pytest.param("/v1/chat/completions", CHAT | {"stream": True}, 1, id="chat-stream"),
    pytest.param("/v1/chat/completions", CHAT | {"n": 2}, 2, id="chat-whole"),
]


@pytest.mark.parametrize(("path", "body", "num_choices"), BODIES)
def test_a_client_of_a_running_request_leaves(live: Live, path: str, body: dict[str, Any], num_choices: int) -> None:
    sock = send(live, path, body)
    wait(lambda: live.call(lambda: live.engine.stats.num_running) == num_choices)
    if body.get("stream"):
        assert b"200 OK" in sock.recv(1000)
    time.sleep(0.05)
    assert metric(live, "kv_cache_usage_perc") > 0
    sock.close()
    assert wait(lambda: free(live)) < WITHIN_SECONDS
    assert live.call(lambda: len(live.engine.aborted)) == num_choices
    assert metric(live, "num_requests_running") == 0
    assert metric(live, "kv_cache_usage_perc") == 0
    assert metric(live, "requests_aborted_total") == num_choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_a_queued_request_leaves(live: Live, stream: bool) -> None:
    live.call(live.engine.pause)
    sock = send(live, "/v1/completions", {"prompt": "Hi", "n": 2, "stream": stream})
    wait(lambda: live.call(lambda: live.engine.stats.num_waiting) == 2)
    sock.close()
    assert wait(lambda: free(live)) < WITHIN_SECONDS
    assert live.call(lambda: len(live.engine.aborted)) == 2
    live.call(live.engine.resume)


def test_a_client_that_has_all_it_asked_for_aborts_nothing(live: Live) -> None:
    assert live.complete(max_tokens=3)["usage"]["completion_tokens"] == 3
    live.chunks("/v1/completions", {"prompt": "Hi", "max_tokens": 3})
    assert free(live)
    assert live.call(lambda: live.engine.aborted) == []
    assert metric(live, "requests_aborted_total") == 0


def test_others_go_on(live: Live) -> None:
    stays = send(live, "/v1/completions", {"prompt": "Hi", "max_tokens": 30})
    leaves = send(live, "/v1/completions", {"prompt": "Hi", "max_tokens": 200})
    wait(lambda: live.call(lambda: live.engine.stats.num_running) == 2)
    leaves.close()
    answer = b""
    while b'"total_tokens":32' not in answer:
        part = stays.recv(4096)
        assert part, answer
        answer += part
    stays.close()
    assert wait(lambda: free(live)) < WITHIN_SECONDS


def test_a_client_that_reads_nothing_holds_up_nobody(live: Live) -> None:
    """What it does not read waits in buffers of a fixed size; when it leaves, its request goes with it."""
    live.call(lambda: setattr(live.engine, "step_seconds", 0.0))
    sock = send(live, "/v1/completions", {"prompt": "Hi", "n": 8, "max_tokens": 250, "logprobs": 20, "stream": True})
    wait(lambda: live.call(lambda: len(live.engine.requests)) == 8)
    assert live.complete(max_tokens=3)["usage"]["completion_tokens"] == 3
    sock.close()
    assert wait(lambda: free(live)) < WITHIN_SECONDS


def test_a_broken_request_leaves_nothing_behind(live: Live) -> None:
    """A batch whose last choice is refused, and a choice that fails, take the other choices with them."""
    live.call(lambda: setattr(live.engine, "max_waiting", 3))
    assert live.post("/v1/completions", {"prompt": "Hi", "n": 5}).status_code == 503
    assert wait(lambda: free(live)) < WITHIN_SECONDS

    def fail_one(request: Any) -> list[int]:
        return [5] * 10_000 if request.params.choice else [2]

    live.call(lambda: setattr(live.engine, "max_waiting", 100))
    live.call(lambda: setattr(live.engine, "fail_at", 3))
    response = live.post("/v1/completions", {"prompt": "Hi", "n": 5})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert wait(lambda: free(live)) < WITHIN_SECONDS
    assert metric(live, "requests_aborted_total") == 0


def test_a_failure_in_the_middle_of_a_stream(live: Live) -> None:
    live.call(lambda: setattr(live.engine, "fail_at", 3))
    *chunks, last = live.events("/v1/completions", {"prompt": "Hi"})
    assert len(chunks) == 3
    error = json.loads(last)["error"]
    assert error == {
        "message": "The request failed inside the engine.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert free(live)


def test_the_death_of_the_engine_answers_everybody(live: Live) -> None:
    whole = send(live, "/v1/completions", {"prompt": "Hi", "max_tokens": 200})
    stream = send(live, "/v1/completions", {"prompt": "Hi", "max_tokens": 200, "stream": True})
    wait(lambda: live.call(lambda: live.engine.stats.num_running) == 2)
    assert b"200 OK" in stream.recv(1000)
    live.call(lambda: live.engine.die("killed"))
    assert b"500 Internal Server Error" in whole.recv(10_000)
    rest = b""
    while not rest.endswith(b"0\r\n\r\n"):
        part = stream.recv(10_000)
        assert part, rest
        rest += part
    assert b'"code":"engine_dead"' in rest
    assert b"[DONE]" not in rest
    assert live.call(lambda: live.service.num_inflight) == 0
    whole.close()
    stream.close()
