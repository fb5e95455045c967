"""A real `mixserve serve` in a process of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def engine_process(self) -> psutil.Process:
        """The server's only child beside the one that checks grammars."""
        (child,) = [child for child in psutil.Process(self.process.pid).children() if not _checks_grammars(child)]
        return child

    def metric(self, name: str, *, key: str | None = None) -> float:
        """The value of an unlabelled-but-for-the-model metric. `key` for a server that asks for one."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        for line in httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def wait_for_metric(self, name: str, value: float, *, seconds: float, key: str | None = None) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.metric(name, key=key)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)


def _checks_grammars(process: psutil.Process) -> bool:
    """Also of one that has just ended: no engine does that while its server is looked at."""
    try:
        return "engine.grammar.check_process" in process.cmdline()
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def running_server(*args: str, seconds: float = 120) -> Iterator[Server]:
    """Start the server with `args`, wait until it is ready, and end it and its engine whatever happens."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", *args, "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            wait_until_ready(server, seconds)
            yield server
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                for child in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.wait(10)


def wait_until_ready(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert server.process.poll() is None, f"the server ended: {server.log_text()}"
        assert time.monotonic() < deadline, f"the server does not get ready: {server.log_text()}"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
