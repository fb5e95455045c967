"""A server with OpenAI's API whose every delay is known, in a thread of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reply = tuple[int, Any]
"""A status, and a body as JSON or as it is."""


@dataclass(kw_only=True)
class Behaviour:
    """How the stub answers. Times in seconds."""

    ttft: float = 0.0
    itl: float = 0.0
    usage: bool = True
    cached_tokens: int | None = None
    models: tuple[str, ...] | Reply = ("stub",)
    reply: Callable[[int, dict[str, Any]], Reply | None] = lambda *_: None
    """Called for each generation, which are numbered from 0, with its body: what to answer instead of a stream."""
    break_after: int | None = None
    """Close the connection after so many tokens."""
    part: int | None = None
    """Send the body in parts of so many bytes, a packet each."""
    vocab_size: int | None = None
    """With one, there are /tokenize (a token a character) and /detokenize."""
    close_kept: bool = False
    """Close each connection after an answer without saying so."""


@dataclass
class Seen:
    """One request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    arrived: float
    connection: int
    running: int
    """Generations that ran when it had come, itself too."""


@dataclass
class Stub:
    url: str
    seen: list[Seen] = field(default_factory=list)

    @property
    def generations(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.endswith("completions")]


@contextmanager
def stub_server(behaviour: Behaviour | None = None, tls: ssl.SSLContext | None = None) -> Iterator[Stub]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    handler = _Handler(behaviour or Behaviour())
    try:
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(handler.connection, "127.0.0.1", 0, ssl=tls), loop
        ).result(5)
        scheme = "http" if tls is None else "https"
        stub = Stub(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", handler.seen)
        yield stub
    finally:
        asyncio.run_coroutine_threadsafe(handler.stop(server), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


class _Handler:
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_connections = self._num_generations = self._running = 0
        self.seen: list[Seen] = []

    async def stop(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        number = self._num_connections
        self._num_connections += 1
        try:
            while await self._request(number, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, connection: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether another request may follow."""
        head, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in fields)}
        content = await reader.readexactly(int(headers["content-length"]))
        path, body = head.split(" ")[1], json.loads(content) if content else {}
        is_generation = path.endswith("completions")
        self._running += is_generation
        self.seen.append(Seen(path, headers, body, time.perf_counter(), connection, self._running))
        try:
            if not is_generation:
                _write(writer, *self._other(path, body))
                return not self._behaviour.close_kept
            number = self._num_generations
            self._num_generations += 1
            if (reply := self._behaviour.reply(number, body)) is not None:
                _write(writer, *reply)
                return True
            return await self._stream("chat" in path, body, writer)
        finally:
            self._running -= is_generation

    def _other(self, path: str, body: dict[str, Any]) -> Reply:
        behaviour = self._behaviour
        if path == "/v1/models":
            models = behaviour.models
            if models and isinstance(models[0], int):
                return models[0], models[1]
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
        if behaviour.vocab_size is not None and path == "/tokenize":
            return 200, {"tokens": [*range(len(body["prompt"]))]}
        if behaviour.vocab_size is not None and path == "/detokenize":
            known = max(body["tokens"]) < behaviour.vocab_size
            return (200, {"prompt": "x"}) if known else (400, {"error": {"message": "no such token"}})
        return 404, {"error": {"message": f"no {path} here"}}

    async def _stream(self, is_chat: bool, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        behaviour, count = self._behaviour, body["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if is_chat:
            await self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, writer)
        for number in range(count):
            await asyncio.sleep(behaviour.itl if number else behaviour.ttft)
            if number == behaviour.break_after:
                return False
            text: dict[str, Any] = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            await self._event({"choices": [{**text, "finish_reason": None}]}, writer)
        text = {"delta": {}} if is_chat else {"text": ""}
        await self._event({"choices": [{**text, "finish_reason": "length"}]}, writer)
        if behaviour.usage:
            prompt = body["messages" if is_chat else "prompt"]
            usage: dict[str, Any] = {"prompt_tokens": 2 * len(prompt), "completion_tokens": count}
            if behaviour.cached_tokens is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": behaviour.cached_tokens}
            await self._event({"choices": [], "usage": usage}, writer)
        await self._event("[DONE]", writer)
        writer.write(b"0\r\n\r\n")
        return not behaviour.close_kept

    async def _event(self, data: Any, writer: asyncio.StreamWriter) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        event = f"data: {text}\n\n".encode()
        size = self._behaviour.part or len(event)
        for start in range(0, len(event), size):
            part = event[start : start + size]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            if self._behaviour.part:
                await asyncio.sleep(0)


def _write(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d Whatever\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content))
