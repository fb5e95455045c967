"""What the HTTP layer costs: processor time of the server's process for each token that it streams.

python -m tests.bench.layer_cost [--streams 64] [--rate 2000] [--seconds 20] [--repeat 3] [--where] [--json FILE]

The engine is a stub (tests/bench/stub_core.py) in a process of its own, as the engine always is, so what is measured is
everything from its socket to the clients': reading events, text, stop strings, JSON, HTTP. The clients are plain
sockets in this process. The time is user and system time of the server's process alone, without the requests' start.

With --where a sampler in the server says which functions ran; that run is apart from those that are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_CHAT = {"messages": [{"role": "user", "content": "Tell me of the lighthouse keeper and his daughter."}]}
_COMPLETION = {"prompt": "The lighthouse keeper and his daughter:", "max_tokens": 30000}
_TOOL = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object"}}}
_STOPS = ["</answer>", "The end", "\n\n\n", "Observation:"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, _CHAT),
    "chat, 4 stop strings": (CHAT, _CHAT | {"stop": _STOPS}),
    "chat, a tool offered": (CHAT, _CHAT | {"tools": [_TOOL]}),
    "chat, 5 logprobs": (CHAT, _CHAT | {"logprobs": True, "top_logprobs": 5}),
    "completions": (COMPLETIONS, _COMPLETION),
    "completions, 4 stop strings": (COMPLETIONS, _COMPLETION | {"stop": _STOPS}),
    "completions, 5 logprobs": (COMPLETIONS, _COMPLETION | {"logprobs": 5}),
}

PARTS = (
    ("reading the engine's messages", ("engine/wire.py", "engine/child.py", "asyncio/streams.py")),
    ("handing events to their streams", ("engine/client.py", "engine/stream.py")),
    ("ids to text, stop strings", ("engine/text/",)),
    ("deltas and logprobs", ("server/job.py", "server/choices.py", "server/logprobs.py")),
    ("finding tool calls", ("server/voices.py", "server/tools/")),
    ("chunks and JSON", ("server/routes/", "server/json_io.py", "server/stream.py")),
    ("metrics", ("server/metrics.py", "prometheus_client/")),
    ("HTTP: middleware, uvicorn", ("server/edge/", "server/front.py", "starlette/", "fastapi/", "uvicorn/")),
    ("socket calls", ("asyncio/selector_events.py",)),
    ("event loop and everything else", ("",)),
)
"""What a sampled function belongs to: the first whose list has a piece of its file's path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the server: `rate` tokens a second over all streams, watched for `seconds`."""

    streams: int
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One run. Below one event a token, the server fell behind and merged some: it then looks cheaper than it is."""

    microseconds: float
    """Of processor time for each token."""
    tokens: int
    events: int
    share_of_core: float


class Streams:
    """Streamed answers to the same request, read as they come."""

    def __init__(self, port: int, path: str, body: Mapping[str, Any], count: int) -> None:
        payload = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self._selector = selectors.DefaultSelector()
        self._read: dict[socket.socket, bytearray] = {}
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(payload) + payload)
            self._selector.register(sock, selectors.EVENT_READ)
            self._read[sock] = bytearray()

    def read_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65536)
                assert data, f"the server ended a stream: {self._read[key.fileobj][-500:]!r}"
                self._read[key.fileobj] += data

    @property
    def counts(self) -> list[int]:
        """Events with text of each stream so far."""
        return [data.count(b'"content":"') + data.count(b'"text":"') for data in self._read.values()]

    def close(self) -> None:
        for sock in self._read:
            sock.close()
        self._selector.close()


@dataclass(frozen=True, slots=True)
class Server:
    """A running stub server; `samples` is where its sampler writes, if it has one."""

    process: psutil.Popen
    port: int
    samples: Path | None

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"mixserve_{name}{{"))

    def processor_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def running_server(step_seconds: float, samples: Path | None = None) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.bench.stub_server", str(port), str(step_seconds)]
    process = psutil.Popen(command + ([] if samples is None else [str(samples)]), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not get ready"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                break
            time.sleep(0.1)
        yield Server(process, port, samples)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()  # and the engine leaves with it
            process.wait(10)


def measure(server: Server, case: str, load: Load) -> Cost:
    """Start all streams, then watch the server while they run."""
    path, body = CASES[case]
    streams = Streams(server.port, path, body, load.streams)
    try:
        deadline = time.monotonic() + 30
        while min(streams.counts) < 3:
            assert time.monotonic() < deadline, "not every stream has begun"
            streams.read_for(0.2)
        if server.samples is not None:
            server.process.send_signal(signal.SIGUSR1)
        events, tokens = sum(streams.counts), server.metric("generation_tokens_total")
        begin, used = time.monotonic(), server.processor_seconds()
        streams.read_for(load.seconds)
        used, seconds = server.processor_seconds() - used, time.monotonic() - begin
        tokens = server.metric("generation_tokens_total") - tokens
        events = sum(streams.counts) - events
        if server.samples is not None:
            server.process.send_signal(signal.SIGUSR1)
    finally:
        streams.close()
    deadline = time.monotonic() + 30
    while server.metric("num_requests_running") > 0:
        assert time.monotonic() < deadline, "streams without a client go on"
        time.sleep(0.05)
    return Cost(microseconds=1e6 * used / tokens, tokens=round(tokens), events=events, share_of_core=used / seconds)


def where(server: Server, case: str, load: Load) -> dict[str, float]:
    """Microseconds a token of each of PARTS; `server` has a sampler."""
    assert server.samples is not None
    cost = measure(server, case, load)
    counts: dict[str, int] = json.loads(server.samples.read_text())
    shares = dict.fromkeys((name for name, _ in PARTS), 0.0)
    for function, count in counts.items():
        name = next(name for name, pieces in PARTS if any(piece in function for piece in pieces))
        shares[name] += count * cost.microseconds / sum(counts.values())
    return shares


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2000.0, help="tokens a second, of all streams together")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--case", choices=CASES, action="append", help="may be given again; default: all")
    parser.add_argument("--where", action="store_true", help="also say where the time goes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    load = Load(streams=arguments.streams, rate=arguments.rate, seconds=arguments.seconds)
    cases = arguments.case or list(CASES)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{load.streams} streams, {load.rate:g} tokens/s, {arguments.repeat} times {load.seconds:g} s\n")
    print(f"{'':30}  us a token: median (all)       events a token  share of a core")
    with running_server(load.streams / load.rate) as server:
        for case in cases:
            costs = sorted((measure(server, case, load) for _ in range(arguments.repeat)), key=lambda c: c.microseconds)
            all_of_them = [round(cost.microseconds, 1) for cost in costs]
            median = statistics.median(all_of_them)
            events = sum(cost.events for cost in costs) / sum(cost.tokens for cost in costs)
            share = statistics.median(cost.share_of_core for cost in costs)
            rows[case] = {"microseconds": median, "all": all_of_them, "events_a_token": events, "share_of_core": share}
            shown = f"{median:.0f} ({', '.join(f'{value:.0f}' for value in all_of_them)})"
            print(f"{case:30}  {shown:30} {events:14.2f} {share:16.1%}", flush=True)
    if arguments.where:
        # The kernel samples at its ticks, every 4 ms on most; the odd factor keeps steps from being in time with them.
        step_seconds = 1.013 * load.streams / load.rate
        with tempfile.TemporaryDirectory() as folder, running_server(step_seconds, Path(folder) / "samples") as server:
            for case in cases:
                rows[case]["where"] = where(server, case, load)
                print(f"\n{case}: us a token")
                for name, microseconds in rows[case]["where"].items():
                    print(f"  {name:34} {microseconds:6.1f}", flush=True)
    print("\n" + json.dumps(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
