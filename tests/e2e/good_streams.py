"""Four good streams beside whatever a test does to a server; what they say must not change."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from tests.e2e.running import Server

NUM_STREAMS = 4
WIDE = 0.02
"""Smallest gap of the two likeliest tokens, in nats: some thousand times what rounding in float32 can move."""
_CANDIDATES = 48
_TOKENS = 100
_POOL_THREADS = 6
"""What Python's default pool of threads may grow by, which is no leak."""

Said = tuple[str, tuple[str, ...]]
"""Text and tokens: two broken characters look alike in the text."""


@contextlib.contextmanager
def unharmed(server: Server, model: str, *, key: str | None = None) -> Iterator[GoodStreams]:
    """Around whatever is done to `server`: four streams say the same all the time, and nothing is left of it after.

    Nothing: no request, block, thread or descriptor, no traceback in the log. Then the server is ended, which takes no
    time when it has nothing to do.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    httpx.post(f"{server.url}/v1/completions", json={"model": model, "prompt": "warm"}, headers=headers)
    engine = server.engine_process()
    before = Footprint.of(server)
    streams = GoodStreams(server.url, model, headers)
    streams.start()
    try:
        yield streams
    finally:
        streams.stop()
    streams.check()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        server.wait_for_metric(f"mixserve_{name}", 0, seconds=2, key=key)
    wait_until_back_at(server, before, seconds=10)
    assert server.engine_process() == engine, "the engine was started anew"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(4) == 0
    assert "Traceback" not in server.log_text(), server.log_text()


class GoodStreams:
    """Greedy, in float32, of prompts whose gaps are wide: nothing but a fault can change what they say."""

    def __init__(self, url: str, model: str, headers: Mapping[str, str]) -> None:
        self._model = model
        self._client = httpx.Client(base_url=url, headers=dict(headers), timeout=60)
        self._alone = {prompt: self._stream(prompt) for prompt in self._wide_prompts()}
        self._stopped = threading.Event()
        self._rounds = dict.fromkeys(self._alone, 0)
        self._faults: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(prompt,)) for prompt in self._alone]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        assert all(self._rounds.values()), "a stream never came to its end"

    def check(self) -> None:
        """Raise when a stream failed or said something else, so far."""
        assert self._faults == []

    def _run(self, prompt: str) -> None:
        try:
            while not self._stopped.is_set():
                said = self._stream(prompt)
                if said != self._alone[prompt]:
                    self._faults.append(f"{prompt}: {said} instead of {self._alone[prompt]}")
                self._rounds[prompt] += 1
        except Exception as error:
            self._faults.append(f"{prompt}: {error!r}")

    def _wide_prompts(self) -> list[str]:
        prompts = []
        for number in range(_CANDIDATES):
            prompt = f"good stream {number}"
            answer = self._client.post("/v1/completions", json=self._body(prompt) | {"logprobs": 2})
            tops = [sorted(top.values()) for top in answer.json()["choices"][0]["logprobs"]["top_logprobs"]]
            if all(top[-1] - top[-2] >= WIDE for top in tops):
                prompts.append(prompt)
            if len(prompts) == NUM_STREAMS:
                return prompts
        raise AssertionError(f"fewer than {NUM_STREAMS} of {_CANDIDATES} prompts have gaps of {WIDE}")

    def _stream(self, prompt: str) -> Said:
        response = self._client.post("/v1/completions", json=self._body(prompt) | {"logprobs": 0, "stream": True})
        assert response.status_code == 200, response.text
        *events, last = response.text.removesuffix("\n\n").split("\n\n")
        assert last == "data: [DONE]", last
        text, tokens = "", list[str]()
        for event in events:
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            text += choice["text"]
            tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
        assert len(tokens) == _TOKENS
        return text, tuple(tokens)

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Footprint:
    """What a server holds on to, seen from outside."""

    threads: int
    descriptors: int
    engine_threads: int
    engine_descriptors: int

    @classmethod
    def of(cls, server: Server) -> Footprint:
        process, engine = psutil.Process(server.process.pid), server.engine_process()
        return cls(process.num_threads(), process.num_fds(), engine.num_threads(), engine.num_fds())

    def is_back_at(self, before: Footprint) -> bool:
        return (
            self.threads <= before.threads + _POOL_THREADS
            and self.descriptors <= before.descriptors
            and self.engine_threads <= before.engine_threads
            and self.engine_descriptors <= before.engine_descriptors
        )


def wait_until_back_at(server: Server, before: Footprint, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (now := Footprint.of(server)).is_back_at(before):
        assert time.monotonic() < deadline, f"{now}, but {before} at the start"
        time.sleep(0.1)
