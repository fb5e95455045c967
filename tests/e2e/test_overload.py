"""Row H18: a server that is full, or about to leave, says so at once, and what runs is not disturbed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.bad_cases import CHAT, COMPLETIONS, MODEL
from tests.e2e.error_answers import check_error
from tests.e2e.running import Server, running_server

LONG = {"model": MODEL, "prompt": "a long story", "max_tokens": 700, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 2}


def read_stream(url: str, started: threading.Semaphore | None = None) -> str:
    """The text of LONG, streamed to its end; `started` is released with the first event."""
    text = ""
    with httpx.stream("POST", f"{url}{COMPLETIONS}", json=LONG | {"stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if started is not None and not text:
                started.release()
                started = None
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    raise AssertionError("the stream broke off")


@contextlib.contextmanager
def long_streams(server: Server, count: int) -> Iterator[list[Future[str]]]:
    """So many running streams of LONG."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(count) as pool:
        streams = [pool.submit(read_stream, server.url, started) for _ in range(count)]
        for _ in streams:
            assert started.acquire(timeout=20)
        yield streams


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    start = time.monotonic()
    check_error(client.post(path, json=body), 503, param=None, code="server_overloaded")
    assert time.monotonic() - start < 1


def end_idle(server: Server) -> None:
    """End a server that has nothing to do, as it knows too."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(4) == 0
    assert "Traceback" not in server.log_text(), server.log_text()


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, SHORT),
    (COMPLETIONS, SHORT | {"stream": True}),
    (COMPLETIONS, SHORT | {"n": 2}),
    (COMPLETIONS, SHORT | {"prompt": ["a", "b"]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}),
]


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (2, 2)])
def test_a_full_queue(tiny_checkpoint: Path, running: int, waiting: int) -> None:
    limits = ("--max-num-seqs", str(running), "--max-num-queued-requests", str(waiting))
    options = (str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32", *limits)
    with running_server(*options) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        alone = read_stream(server.url)
        with long_streams(server, running) as streams, ThreadPoolExecutor(max(1, waiting)) as pool:
            queued = [
                pool.submit(httpx.post, f"{server.url}{COMPLETIONS}", json=SHORT, timeout=60) for _ in range(waiting)
            ]
            server.wait_for_metric("mixserve_num_requests_waiting", waiting, seconds=5)
            for path, body in BODIES:
                refused(client, path, body)
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 200
            assert not any(stream.done() for stream in streams), "the server was full all the while"
            assert [stream.result() for stream in streams] == [alone] * len(streams)
            for answer in queued:
                assert answer.result().status_code == 200
        assert client.post(COMPLETIONS, json=SHORT).status_code == 200
        assert server.metric("mixserve_requests_rejected_total") == len(BODIES)
        server.wait_for_metric("mixserve_kv_cache_usage_perc", 0, seconds=2)
        end_idle(server)


def test_choices_that_do_not_all_fit_leave_nothing_behind(tiny_checkpoint: Path) -> None:
    """The first of them did fit."""
    options = ("--served-model-name", MODEL, "--max-num-seqs", "1", "--max-num-queued-requests", "2")
    with running_server(str(tiny_checkpoint), *options) as server, httpx.Client(base_url=server.url) as client:
        with long_streams(server, 1) as streams:
            refused(client, COMPLETIONS, LONG | {"n": 5})
            time.sleep(0.2)  # the metric is of the latest step
            assert server.metric("mixserve_num_requests_waiting") == 0
            assert not streams[0].done(), "else those that wait would run"
        server.wait_for_metric("mixserve_kv_cache_usage_perc", 0, seconds=1)
        end_idle(server)


def test_a_server_that_shuts_down(tiny_checkpoint: Path) -> None:
    options = (str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32")
    with running_server(*options) as server, httpx.Client(base_url=server.url) as open_connection:
        alone = read_stream(server.url)
        assert open_connection.get("/ready").status_code == 200
        with long_streams(server, 4) as streams:
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 2
            while open_connection.get("/ready").status_code == 200:
                assert time.monotonic() < deadline
            for path, body in BODIES:
                refused(open_connection, path, body)
            check_error(open_connection.get("/ready"), 503, param=None, code="server_overloaded")
            assert open_connection.get("/health").status_code == 200, "alive until the last byte"
            with httpx.Client(base_url=server.url) as new_connection:
                refused(new_connection, COMPLETIONS, SHORT)
            assert not any(stream.done() for stream in streams), "the server was draining all the while"
            assert [stream.result() for stream in streams] == [alone] * len(streams)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log_text()
