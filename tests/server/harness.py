"""The real app over a fake engine, on a loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI

from engine.text import Tokenizer
from server.app import create_app
from server.config import ServerConfig
from server.run import HttpServer, listen
from server.service import Service
from tests.server.fake_engine import FakeEngine

MODEL = "org/fake-model"

T = TypeVar("T")


@dataclass(frozen=True)
class Live:
    """A running server. `engine` and `service` belong to its thread: change them through `call`."""

    url: str
    engine: FakeEngine
    service: Service
    client: httpx2.Client
    loop: asyncio.AbstractEventLoop
    app: FastAPI
    http: HttpServer

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **kwargs)

    def complete(self, **body: Any) -> dict[str, Any]:
        return _ok(self.post("/v1/completions", {"prompt": "Hi"} | body))

    def chat(self, **body: Any) -> dict[str, Any]:
        return _ok(self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | body))

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The data of every server-sent event of a stream, read with a strict parser."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return parse_events(response.content)

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream that ends as it should."""
        *events, last = self.events(path, body)
        assert last == "[DONE]"
        return [json.loads(event) for event in events]


def parse_events(content: bytes) -> list[str]:
    *events, rest = content.decode().split("\n\n")
    assert rest == ""
    for event in events:
        assert event.startswith("data: ")
        assert "\n" not in event
    return [event.removeprefix("data: ") for event in events]


def _ok(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@contextmanager
def live_server(
    make_engine: Callable[[], FakeEngine],
    tokenizer: Tokenizer,
    config: ServerConfig | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Live]:
    """Serve until the block ends. `make_engine` runs in the server's thread."""
    config = replace(config or ServerConfig(served_model_name=MODEL))
    sock = listen("127.0.0.1", 0)
    url = f"{'http' if tls is None else 'https'}://127.0.0.1:{sock.getsockname()[1]}"
    started = threading.Event()
    made: dict[str, Any] = {}

    async def main() -> None:
        engine = make_engine()
        app = create_app(engine, tokenizer, config)
        http = HttpServer(app, lambda: None, config.edge, app.state.service.metrics.count_rejected, tls)
        made.update(engine=engine, app=app, service=app.state.service, http=http, loop=asyncio.get_running_loop())
        started.set()
        await http.serve(sockets=[sock])
        await app.state.service.close()
        await engine.shutdown()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(10)
        with httpx2.Client(base_url=url, timeout=20) as client:
            yield Live(url, made["engine"], made["service"], client, made["loop"], made["app"], made["http"])
    finally:
        made["http"].should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error object, which has exactly OpenAI's fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    assert error["type"] == ("server_error" if status >= 500 else kind)
    return error


class GoodStreams:
    """Four clients that stream the same answer over and over."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._stop = threading.Event()
        self.texts: list[str] = []
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                chunks = self._live.chunks("/v1/completions", {"prompt": "Hi"})
                self.texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
        except Exception as error:
            self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
