"""GET /v1/experts/events: a stream beside the others, for as long as the server and the client want it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.e2e.raw import connection, head
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, error_of, live_server
from tests.server.test_client_leaves import wait

PATH = "/v1/experts/events"


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    with live_server(lambda: FakeEngine(lambda _: [8] * 100, step_seconds=0.01), tokenizer) as live:
        yield live


@contextmanager
def listening(live: Live, **headers: str) -> Iterator[Callable[[], str]]:
    """Gives the data of one event after the other."""
    before = live.call(lambda: live.service.feed.num_listeners)
    with live.client.stream("GET", PATH, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        lines = response.iter_lines()

        def one() -> str:
            line, empty = next(lines), next(lines)
            assert line.startswith("data: ")
            assert empty == ""
            return line.removeprefix("data: ")

        yield one
    # Whoever has listened leaves nothing behind.
    wait(lambda: live.call(lambda: live.service.feed.num_listeners) == before)


def test_events_follow_what_happens(live: Live) -> None:
    begun = time.monotonic()
    with listening(live) as event:
        first = json.loads(event())
        assert time.monotonic() - begun < 0.7, "the first comes at once"
        assert first["routing"]["total"]["tokens"] == 0
        assert (first["throughput"], first["latency"]["time_to_first_token"]) == (None, None)
        answer = live.complete(prompt=[16, 17], max_tokens=50)
        assert answer["usage"]["completion_tokens"] == 50
        second = json.loads(event())
        assert 0.8 < second["time"] - first["time"] < 1.9, "one a second"
        assert second["routing"]["total"]["tokens"] == 52
        assert second["engine"]["generation_tokens"] == 50
        assert 20 < second["throughput"]["output_tokens_per_second"] < 60
        inter_token = second["latency"]["inter_token"]
        assert inter_token["count"] == 49
        assert 0.009 < inter_token["p50"] <= inter_token["p90"] <= inter_token["p99"] < 1
        assert second["latency"]["time_to_first_token"]["count"] == 1


def test_ten_pages_cost_one_question_a_second(live: Live) -> None:
    ends: list[float] = []

    def read() -> None:
        with httpx2.Client(base_url=live.url, timeout=20) as client, client.stream("GET", PATH) as response:
            found = 0
            for line in response.iter_lines():
                found += line.startswith("data")
                if found == 3:
                    break
        ends.append(time.monotonic())

    threads = [threading.Thread(target=read) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ends) == 10
    assert live.call(lambda: live.engine.num_reports) <= 5
    asked = live.call(lambda: live.engine.num_reports)
    time.sleep(1.2)
    assert live.call(lambda: live.engine.num_reports) == asked, "nobody listens any more"


def test_a_reader_that_does_not_read_holds_up_nobody(live: Live) -> None:
    with connection(live.url) as sock:
        sock.sendall(head("GET", PATH))
        wait(lambda: live.call(lambda: live.service.feed.num_listeners) == 1)
        with listening(live) as event:
            for _ in range(3):
                event()
            assert live.call(lambda: live.service.feed.num_listeners) == 2
    wait(lambda: live.call(lambda: live.service.feed.num_listeners) == 0)


def test_streams_take_no_place_of_requests(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(max_concurrent_per_key=1))
    engine = lambda: FakeEngine(lambda _: [8], info=fake_info(max_num_seqs=1), max_waiting=1)  # noqa: E731
    with live_server(engine, tokenizer, config) as live, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(live.client.stream("GET", PATH))
        assert live.call(lambda: live.service.num_inflight) == 0
        assert live.complete()["usage"]["completion_tokens"] == 2


def test_a_dead_engine_is_an_event_and_not_a_second_late(live: Live) -> None:
    with listening(live) as event:
        assert json.loads(event())["health"]["status"] == "ok"
        begun = time.monotonic()
        live.call(lambda: live.engine.die("killed by SIGKILL"))
        live.call(live.service.drain)
        health = json.loads(event())["health"]
        assert time.monotonic() - begun < 0.7
        assert health["status"] == "dead"
        assert "killed by SIGKILL" in health["message"]


def test_the_end_of_the_server_is_the_end_of_the_stream(live: Live) -> None:
    with listening(live) as event:
        event()
        live.call(live.service.drain)
        assert json.loads(event())["health"]["status"] == "shutting_down"
        closing = asyncio.run_coroutine_threadsafe(live.service.feed.close(), live.loop)
        assert event() == "[DONE]"
        closing.result(10)


def test_without_a_record_events_go_on(tokenizer: Tokenizer) -> None:
    info = replace(fake_info(), record_routing=False)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live, listening(live) as event:
        found = json.loads(event())
        assert found["routing"] is None
        assert found["model"]["record_routing"] is False


def test_what_fails_is_told_in_the_stream(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise ValueError("secret")

    with listening(live) as event:
        event()
        live.call(lambda: setattr(live.engine, "expert_report", broken))
        with caplog.at_level(logging.CRITICAL, "asyncio"):
            error = json.loads(event())["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]


def test_a_server_with_keys(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    edge = EdgeConfig(api_keys=(ApiKey.of("sk-1"),), allowed_origins=("https://example.com",))
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    with (
        caplog.at_level(logging.INFO, "server.access"),
        live_server(lambda: FakeEngine(lambda _: []), tokenizer, config) as live,
    ):
        for headers in ({}, {"Authorization": "Bearer sk-2"}):
            assert error_of(live.client.get(PATH, headers=headers), 401)["code"] == "invalid_api_key"
        assert live.call(lambda: live.engine.num_reports) == 0, "strangers cost nothing"
        with listening(live, Authorization="Bearer sk-1") as event:
            event()
        request = live.client.build_request(
            "GET", PATH, headers={"Authorization": "Bearer sk-1", "Origin": "https://example.com"}
        )
        response = live.client.send(request, stream=True)
        assert response.headers["access-control-allow-origin"] == "https://example.com"
        response.close()
        wait(lambda: len(caplog.messages) == 4)
    lines = [json.loads(message) for message in caplog.messages]
    assert [(line["status"], line["end"], line["key_id"] is not None) for line in lines] == [
        *[(401, "finished", False)] * 2,
        *[(200, "client_left", True)] * 2,
    ]


def test_other_methods(live: Live) -> None:
    error_of(live.client.post(PATH), 405)
