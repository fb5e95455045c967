"""How many requests of one key may run, and what gives a place back."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.key_limit import KeyLimit
from server.edge.keys import ApiKey
from tests.e2e.raw import connection, exchange, post, read_answer
from tests.server.edge.asgi import call
from tests.server.edge.conftest import KEY, OTHER_KEY, metric
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

LONG = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
REJECTED = 'requests_rejected_total{model_name="org/fake-model",reason="rate_limit_exceeded"}'


@pytest.fixture(params=[True, False], ids=["keys", "anonymous"])
def live(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Iterator[Live]:
    """Two requests a key, of an engine that would take minutes for each."""
    keys = tuple(ApiKey.of(key) for key in (KEY, OTHER_KEY)) if request.param else ()
    config = ServerConfig(
        served_model_name=MODEL, edge=EdgeConfig(api_keys=keys, max_concurrent_per_key=2, body_seconds=0.3)
    )
    with live_server(lambda: FakeEngine(lambda _: [5] * 10_000, step_seconds=0.02), tokenizer, config) as live:
        yield live


def request(body: dict[str, Any], key: str = KEY, path: str = "/v1/completions") -> bytes:
    return post(path, json.dumps(body).encode(), ("Authorization", f"Bearer {key}"))


def status(live: Live, key: str = KEY) -> int:
    """Of a request for one token."""
    return exchange(live.url, [request({"prompt": "Hi", "max_tokens": 1}, key)]).status_code


def running(live: Live) -> int:
    return live.call(lambda: live.service.num_inflight)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def hold(live: Live, stack: ExitStack, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """One more request that runs."""
    before = running(live)
    sock = stack.enter_context(connection(live.url))
    sock.sendall(request(body, path=path))
    wait(lambda: running(live) == before + 1)
    return sock


def test_one_more_is_refused(live: Live) -> None:
    with ExitStack() as stack:
        hold(live, stack, LONG | {"stream": True})
        hold(live, stack, CHAT, "/v1/chat/completions")
        for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT | {"stream": True})):
            answer = exchange(live.url, [request(body, path=path)])
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "rate_limit_exceeded")
            assert "2 requests" in error["message"]
        assert metric(live, REJECTED, key=KEY) == 2
        assert live.client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        # Another key has places of its own; without keys, all clients are one.
        assert status(live, OTHER_KEY) == (200 if live.service.config.edge.api_keys else 429)
        assert running(live) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_place_back(live: Live, stream: bool) -> None:
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(2):
                hold(live, stack, LONG | {"stream": stream})
            assert status(live) == 429
        wait(lambda: running(live) == 0)
        assert status(live) == 200


def test_an_answer_that_ends_gives_its_place_back(live: Live) -> None:
    for stream in (False, True):
        with connection(live.url) as sock:
            for _ in range(5):
                sock.sendall(request({"prompt": "Hi", "max_tokens": 1, "stream": stream}))
                assert read_answer(sock).status_code == 200
    assert status(live) == 200


def test_errors_give_their_place_back(live: Live) -> None:
    live.call(lambda: setattr(live.engine, "fail_at", 1))
    for body in (LONG, LONG | {"stream": True}, {"prompt": ""}, {"prompt": "Hi", "model": "other"}):
        for _ in range(3):
            assert exchange(live.url, [request(body)]).status_code in (200, 400, 404, 500)
    for _ in range(3):
        broken = request(LONG)
        with connection(live.url) as sock:
            sock.sendall(broken[:-5])
            assert read_answer(sock).status_code == 408
        with connection(live.url) as sock:
            sock.sendall(broken[:-5])
    live.call(lambda: setattr(live.engine, "fail_at", None))
    wait(lambda: status(live) == 200)


def test_a_body_on_its_way_has_a_place(live: Live) -> None:
    """Else as many as there are sockets could be on their way at once."""
    with ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(connection(live.url))
            sock.sendall(request(LONG)[:-5])
        wait(lambda: status(live) == 429)


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
def test_whatever_ends_the_app_gives_its_place_back(error: type[BaseException]) -> None:
    async def breaks(*_: object) -> None:
        raise error

    limit = KeyLimit(breaks, 1, lambda _: None)
    for _ in range(3):
        with pytest.raises(error):
            call(limit, path="/v1/completions")


def test_without_a_limit_there_is_none(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL)
    config = replace(config, edge=replace(config.edge, max_concurrent_per_key=None))
    with (
        live_server(lambda: FakeEngine(lambda _: [5] * 10_000, step_seconds=0.02), tokenizer, config) as live,
        ExitStack() as stack,
    ):
        for _ in range(10):
            hold(live, stack, LONG)
