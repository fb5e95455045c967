"""What goes wrong around a real server, and that nobody is left without an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.running import Server, running_server

LONG = {"model": "tiny", "prompt": "a long story", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def stream_until_end(url: str, body: dict[str, Any], started: threading.Semaphore | None = None) -> list[str]:
    """The data lines of a stream, until it ends in whatever way."""
    lines = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                if len(lines) == 3 and started is not None:
                    started.release()
    return lines


def test_a_client_that_leaves_frees_its_blocks(tiny_server: Server) -> None:
    """A streaming client, a plain one, and ones that still wait."""

    async def leave(stream: bool, after: float) -> None:
        async with httpx.AsyncClient(base_url=tiny_server.url, timeout=30) as client:
            async with asyncio.timeout(after):
                if stream:
                    async with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
                        async for _ in response.aiter_lines():
                            pass
                else:
                    await client.post("/v1/completions", json=LONG | {"n": 3})

    async def all_leave() -> None:
        results = await asyncio.gather(
            *(leave(stream, 0.3 + 0.02 * i) for i, stream in enumerate([True, False] * 6)), return_exceptions=True
        )
        assert all(isinstance(result, TimeoutError) for result in results)

    asyncio.run(all_leave())
    tiny_server.wait_for_metric("mixserve_num_requests_running", 0, seconds=1)
    tiny_server.wait_for_metric("mixserve_num_requests_waiting", 0, seconds=1)
    tiny_server.wait_for_metric("mixserve_kv_cache_usage_perc", 0, seconds=1)
    assert tiny_server.metric("mixserve_requests_aborted_total") >= 12


def test_killed_engine_answers_everyone_and_leaves_no_orphan(tiny_checkpoint: Path) -> None:
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny", "--dtype", "float32") as server:
        engine = server.engine_process()
        started = threading.Semaphore(0)
        with ThreadPoolExecutor(16) as pool:
            streams = [pool.submit(stream_until_end, server.url, LONG, started) for _ in range(8)]
            for _ in range(8):
                assert started.acquire(timeout=20)
            plain = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=30) for _ in range(4)]
            time.sleep(0.3)
            killed = time.monotonic()
            engine.kill()
            ended: list[tuple[Future[Any], float]] = []
            everyone: list[Future[Any]] = [*streams, *plain]
            for future in everyone:
                future.exception(timeout=10)
                ended.append((future, time.monotonic() - killed))
            assert max(seconds for _, seconds in ended) < 2
            for stream in streams:
                *_, last = stream.result()
                assert "error" in json.loads(last), "a stream ends with an error chunk, without [DONE]"
            for answer in plain:
                assert answer.result().status_code >= 500
                assert answer.result().json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.process.wait(15) not in (0, None)
        assert not engine.is_running()
        assert "Traceback" not in server.log_text()


def test_killed_server_takes_its_engine_along(tiny_checkpoint: Path) -> None:
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny") as server:
        engine = server.engine_process()
        with ThreadPoolExecutor(1) as pool:
            started = threading.Semaphore(0)
            stream = pool.submit(stream_until_end, server.url, LONG, started)
            assert started.acquire(timeout=20)
            server.process.kill()
            assert isinstance(stream.exception(timeout=10), httpx.TransportError)
        engine.wait(5)


def test_sigterm_when_idle(tiny_checkpoint: Path) -> None:
    with running_server(str(tiny_checkpoint)) as server:
        engine = server.engine_process()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(4) == 0
        assert not engine.is_running()


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(tiny_checkpoint: Path) -> None:
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny") as server:
        with ThreadPoolExecutor(10) as pool:
            started = threading.Semaphore(0)
            streams = [pool.submit(stream_until_end, server.url, LONG, started) for _ in range(10)]
            for _ in range(10):
                assert started.acquire(timeout=20)
            with httpx.Client(base_url=server.url) as open_connection:
                open_connection.get("/health")
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                try:
                    refused = open_connection.post("/v1/completions", json=LONG)
                except httpx.TransportError:
                    pass  # the connection was idle and is closed by now
                else:
                    assert refused.status_code == 503
                    assert refused.json()["error"]["code"] == "server_overloaded"
                    assert "retry-after" in refused.headers
            for stream in streams:
                assert stream.result(timeout=60)[-1] == "[DONE]"
        assert server.process.wait(10) == 0


def test_a_second_signal_stops_at_once(tiny_checkpoint: Path) -> None:
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny") as server:
        engine = server.engine_process()
        with ThreadPoolExecutor(8) as pool:
            started = threading.Semaphore(0)
            streams = [pool.submit(stream_until_end, server.url, LONG, started) for _ in range(8)]
            for _ in range(8):
                assert started.acquire(timeout=20)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGINT)
            server.process.wait(5)
            for stream in streams:
                stream.exception(timeout=10)
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()


def test_an_exhausted_cache_changes_no_answer(tiny_checkpoint: Path, tiny_server: Server) -> None:
    """F8: 32 blocks for 12 requests that need up to 12 each: preempted, recomputed, equal."""
    num_bytes = 32 * 16 * 256  # blocks, tokens a block, bytes a token (2 layers, 2 heads of 8, float32, K and V)
    bodies = [
        {"model": "tiny", "prompt": [i, 7, 8, i], "max_tokens": 180, "temperature": 0, "ignore_eos": True}
        for i in range(12)
    ]

    def ask(url: str) -> Callable[[dict[str, Any]], str]:
        return lambda body: str(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"])

    options = ("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512")
    with running_server(str(tiny_checkpoint), *options, "--kv-cache-memory-bytes", str(num_bytes)) as small:
        with ThreadPoolExecutor(12) as pool:
            squeezed = list(pool.map(ask(small.url), bodies))
        assert small.metric("mixserve_num_preemptions_total") > 0
        small.wait_for_metric("mixserve_kv_cache_usage_perc", 0, seconds=1)
        # F9: what can never fit is refused
        answer = httpx.post(f"{small.url}/v1/completions", json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert squeezed == [ask(tiny_server.url)(body) for body in bodies]
