"""One server, from a bound socket to the exit code.

    loading   HTTP is up, /health says so, /ready is 503
    serving   until a signal comes or the engine dies
    draining  after the first SIGTERM or SIGINT: new requests are refused, running ones finish (up to a timeout)
    leaving   after that, a second signal, or the engine's death: the engine ends, then HTTP

Exit code 0 after a signal, 1 when the engine died.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, TypeVar, cast

import uvicorn
from starlette.types import ASGIApp

from engine.text import Tokenizer
from server.app import create_app
from server.config import EdgeConfig, ServerConfig
from server.edge.connection import Connection
from server.front import Front
from server.service import Engine, Service
from server.summary import summary

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_BACKLOG = 2048
_FLUSH_SECONDS = 2
"""How long the last bytes of answers may take, once there is nothing more to answer."""


class ListenError(Exception):
    """The address cannot be listened on; the message is one line."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ListenError, which makes a busy port known before any model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return sock


@dataclass(frozen=True, slots=True)
class Prepared:
    """What there is to serve, once the model's files are there."""

    config: ServerConfig
    tokenizer: Tokenizer
    start_engine: Callable[[], Awaitable[Engine]]


def serve(
    sock: socket.socket,
    prepare: Callable[[], Prepared],
    edge: EdgeConfig,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Serve on `sock` until a signal or the engine's death; the exit code.

    `prepare` may take long (a download, a build): it runs in a thread, while HTTP answers that the model loads. `edge`,
    the one of the configuration that it brings, holds from the start. Raises what `prepare` and the engine's start
    raise.
    """
    return asyncio.run(_serve(sock, prepare, edge, tls))


class HttpServer(uvicorn.Server):
    """uvicorn, which leaves when `should_exit` is set, and tells of signals instead of leaving by itself."""

    def __init__(
        self,
        app: ASGIApp,
        on_signal: Callable[[], None],
        edge: EdgeConfig,
        count_rejected: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            # uvicorn does no more than call it
            http=cast(type[asyncio.Protocol], partial(Connection, edge, count_rejected)),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        config.load()
        config.ssl = tls
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        self._loop.call_soon_threadsafe(self._on_signal)


class _Signals:
    """`first` is set by the first signal, `second` by the second."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def receive(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _serve(
    sock: socket.socket, prepare: Callable[[], Prepared], edge: EdgeConfig, tls: ssl.SSLContext | None
) -> int:
    signals = _Signals()
    front = Front(edge)
    http = HttpServer(front, signals.receive, edge, front.count_rejected, tls)
    serving = asyncio.create_task(http.serve(sockets=[sock]))
    serving.add_done_callback(lambda _: signals.receive())  # should HTTP fail, there is nothing left to stay for
    try:
        prepared = await _unless(signals.first, _in_thread(prepare))
        engine = None if prepared is None else await _unless(signals.first, prepared.start_engine())
        if prepared is None or engine is None:
            return 0
        try:
            config = prepared.config
            app = create_app(engine, prepared.tokenizer, config)
            front.put(app, app.state.service.metrics.count_rejected)
            print(
                summary(
                    engine.info,
                    model_name=config.served_model_name,
                    url=_url(sock, "http" if tls is None else "https"),
                    chat=prepared.tokenizer.has_chat_template,
                    needs_key=bool(edge.api_keys),
                ),
                flush=True,
            )
            return await _until_end(engine, app.state.service, signals, config)
        finally:
            await engine.shutdown()
    finally:
        http.should_exit = True
        await serving


def _in_thread(work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """The result of `work`, in a thread that does not keep the process from leaving: a download cannot be cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def tell(set_it: Callable[[Any], None], value: object) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(tell, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(tell, future.set_result, result)

    threading.Thread(target=run, name="prepare", daemon=True).start()
    return future


async def _unless(stop: asyncio.Event, work: Awaitable[_Result]) -> _Result | None:
    """The result of `work`, or None when `stop` comes first; `work` is cancelled then."""
    working = asyncio.ensure_future(work)
    await _first(working, stop.wait())
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return None


async def _until_end(engine: Engine, service: Service, signals: _Signals, config: ServerConfig) -> int:
    death = asyncio.create_task(engine.wait_dead())
    try:
        await _first(death, signals.first.wait())
        service.drain()
        if not death.done():
            log.info("shutting down: %d requests are running, new ones are refused", service.num_inflight)
            await _first(death, signals.second.wait(), service.idle.wait(), seconds=config.shutdown_timeout)
            if service.num_inflight and not death.done():
                log.warning("leaving with %d requests unfinished", service.num_inflight)
        if not death.done():
            return 0
        log.error("the engine is dead: %s", death.result())
        await _first(signals.second.wait(), seconds=config.death_grace)
        return 1
    finally:
        death.cancel()
        await service.close()


async def _first(*work: asyncio.Future[Any] | Coroutine[Any, Any, Any], seconds: float | None = None) -> None:
    """Wait until one is done; coroutines are cancelled then, futures are left alone."""
    futures = {asyncio.ensure_future(item) for item in work}
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for future in futures.difference(item for item in work if isinstance(item, asyncio.Future)):
        future.cancel()


def _url(sock: socket.socket, scheme: str) -> str:
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
