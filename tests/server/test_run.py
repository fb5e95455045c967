"""The life of a server process: loading, serving, draining, leaving; with a fake engine, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from engine.errors import ConfigurationError
from engine.text import Tokenizer
from server.config import ServerConfig
from server.run import ListenError, Prepared, listen, serve
from tests.server.edge.certificates import make_certificate
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def status(self, path: str) -> int | None:
        """None: nobody listens."""
        try:
            return httpx2.get(self.url + path, timeout=5).status_code
        except httpx2.TransportError:
            return None

    def wait(self, path: str, status: int | None, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while self.status(path) != status:
            assert time.monotonic() < end, f"{path} never became {status}"
            time.sleep(0.02)

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, within: float) -> int:
        return self.process.wait(within)


class Client(threading.Thread):
    """One client of one stream: its events, or the status it got instead."""

    def __init__(
        self, server: Server, *, path: str = "/v1/completions", method: str = "POST", **body: Any
    ) -> None:  # fmt: skip
        super().__init__()
        self.events: list[str] = []
        self.status = 0
        self.ended = 0.0
        self._url = server.url + path
        self._method = method
        self._body = {"prompt": "Hi", "stream": True} | body
        self.start()

    def run(self) -> None:
        with httpx2.stream(self._method, self._url, json=self._body, timeout=30) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
        self.ended = time.monotonic()


class Watcher(Client):
    """One reader of what the server does in each second."""

    def __init__(self, server: Server) -> None:
        super().__init__(server, path="/v1/experts/events", method="GET")

    @property
    def health(self) -> list[str]:
        return [json.loads(event)["health"]["status"] for event in self.events if event != "[DONE]"]


def wait_for_tokens(*clients: Client) -> None:
    end = time.monotonic() + 10
    while not all(client.events for client in clients):
        assert time.monotonic() < end
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Server] = []

    def start(load_seconds: float = 0.0, shutdown_timeout: float = 30.0) -> Server:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.serve_fake", str(port), str(load_seconds), str(shutdown_timeout)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        server = Server(process, f"http://127.0.0.1:{port}")
        servers.append(server)
        if not load_seconds:
            server.wait("/ready", 200)
        return server

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate(timeout=10)


def test_an_idle_server_leaves_at_once(start: Start) -> None:
    server = start()
    keep_alive = httpx2.Client()
    assert keep_alive.get(f"{server.url}/health").status_code == 200
    server.signal()
    assert server.exit_code(within=4) == 0
    keep_alive.close()
    output, errors = server.process.communicate()
    assert "curl" in output
    assert "Traceback" not in errors
    assert "Hi" not in errors


def test_a_loaded_server_finishes_what_it_runs_and_refuses_more(start: Start) -> None:
    server = start()
    running = [Client(server, max_tokens=60) for _ in range(6)]
    wait_for_tokens(*running)
    server.signal()
    server.wait("/ready", 503)
    assert server.status("/health") == 200
    late = Client(server)
    late.join(10)
    assert late.status == 503
    for client in running:
        client.join(10)
        assert client.status == 200
        assert client.events[-1] == "[DONE]"
        assert len(client.events) == 62
    assert server.exit_code(within=4) == 0


def test_who_watches_does_not_hold_up_the_end_and_is_told_of_it(start: Start) -> None:
    server = start()
    idle = Watcher(server)
    wait_for_tokens(idle)
    server.signal()
    assert server.exit_code(within=1.5) == 0, "not only once HTTP gives up waiting"
    idle.join(10)
    assert idle.events[-1] == "[DONE]"

    server = start()
    watcher, client = Watcher(server), Client(server, max_tokens=60)
    wait_for_tokens(watcher, client)
    server.signal()
    assert server.exit_code(within=4) == 0
    watcher.join(10)
    assert watcher.health[-1] == "shutting_down"
    assert watcher.events[-1] == "[DONE]"
    client.join(10)
    assert client.events[-1] == "[DONE]"


def test_a_second_signal_ends_everything(start: Start) -> None:
    server = start()
    client = Client(server, max_tokens=240, ignore_eos=True)
    wait_for_tokens(client)
    server.signal()
    server.wait("/ready", 503)
    server.signal()
    assert server.exit_code(within=2) == 0
    client.join(10)
    assert json.loads(client.events[-1])["error"]["code"] == "engine_dead"


def test_draining_has_an_end(start: Start) -> None:
    server = start(shutdown_timeout=1.0)
    client = Client(server, max_tokens=240, ignore_eos=True)
    wait_for_tokens(client)
    began = time.monotonic()
    server.signal()
    assert server.exit_code(within=4) == 0
    assert time.monotonic() - began > 0.9
    client.join(10)
    assert "error" in json.loads(client.events[-1])
    assert "1 requests unfinished" in server.process.communicate()[1]


def test_the_death_of_the_engine(start: Start) -> None:
    server = start()
    clients = [Client(server, max_tokens=240, stream=True) for _ in range(3)]
    watcher = Watcher(server)
    wait_for_tokens(watcher, *clients)
    killed = time.monotonic()
    killer = Client(server, prompt=[7])
    server.wait("/health", 503, seconds=3)
    for client in [*clients, killer]:
        client.join(5)
        assert client.ended - killed < 2
        assert json.loads(client.events[-1])["error"]["code"] == "engine_dead"
    assert server.exit_code(within=4) == 1
    watcher.join(10)
    assert watcher.health[-1] == "dead"
    assert "killed by a test" in watcher.events[-2]
    assert watcher.events[-1] == "[DONE]"
    assert "killed by a test" in server.process.communicate()[1]


def test_loading_is_alive_but_not_ready_and_can_be_ended(start: Start) -> None:
    server = start(load_seconds=60)
    server.wait("/health", 200)
    assert server.status("/ready") == 503
    response = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "Hi"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "server_overloaded"
    assert int(response.headers["retry-after"]) >= 1
    server.signal()
    assert server.exit_code(within=4) == 0


def test_https_with_a_key(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    port = free_port()
    argv = [sys.executable, "-m", "tests.server.serve_fake", str(port), "0", "30", str(certificate), str(key)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = f"https://127.0.0.1:{port}"
        with httpx2.Client(verify=ssl.create_default_context(cafile=str(certificate))) as client:
            end = time.monotonic() + 15
            while not _is_ready(client, url):
                assert time.monotonic() < end
                time.sleep(0.02)
            assert client.get(f"{url}/v1/models", headers={"X-Request-Id": "mine"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=5)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
    assert f"Serving on {url}." in output
    assert f'curl -N {url}/v1/chat/completions -H "Authorization: Bearer $MIXSERVE_API_KEY"' in output
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged if line["request_id"] == "mine"] == [401]
    assert "secret" not in output + errors


def _is_ready(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_an_engine_that_does_not_start(tokenizer: Tokenizer) -> None:
    async def start_engine() -> FakeEngine:
        await asyncio.sleep(0.05)
        raise ConfigurationError("no such device")

    config = ServerConfig(served_model_name="fake")
    with (
        listen("127.0.0.1", 0) as sock,
        pytest.raises(ConfigurationError, match="no such device"),
    ):
        serve(sock, lambda: Prepared(config, tokenizer, start_engine), config.edge)


def test_a_busy_port() -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["999.1.1.1", "no.such.host.invalid"])
def test_no_such_address(host: str) -> None:
    with pytest.raises(ListenError, match=host):
        listen(host, 0)
