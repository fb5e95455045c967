"""`python -m tests.bench.stub_server PORT STEP_SECONDS [SAMPLES]`: the real server, over a stub engine in its process.

With SAMPLES, a file: one SIGUSR1 starts a sampler, the next ends it and writes what it saw, a JSON object
{"file:function": samples} of the innermost Python functions, by processor time.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType

from engine import AsyncEngine
from engine.config import EngineConfig
from engine.text import Tokenizer
from server.config import ServerConfig
from server.edge.access_log import logs_to
from server.run import Prepared, listen, serve
from tests.bench.stub_core import CORE

MODEL = "stub"
TOKENIZER = Path(__file__).parent.parent / "golden" / "mixtral-8x7b"
SAMPLE_SECONDS = 0.004


class Sampler:
    """Counts which function runs, every `SAMPLE_SECONDS` of processor time. A C function counts as its caller."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: collections.Counter[str] = collections.Counter()
        self._running = False
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, self._toggle)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        assert frame is not None
        self._counts[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1

    def _toggle(self, *_: object) -> None:
        self._running = not self._running
        signal.setitimer(signal.ITIMER_PROF, *(2 * [SAMPLE_SECONDS if self._running else 0.0]))
        if not self._running:
            self._path.write_text(json.dumps(self._counts))
            self._counts.clear()


def main(port: int, step_seconds: float, samples: Path | None) -> int:
    logging.basicConfig(level=logging.WARNING)
    if samples is not None:
        Sampler(samples)
    options = json.dumps({"step_seconds": step_seconds, "tokenizer": str(TOKENIZER)})
    start = partial(AsyncEngine.start, EngineConfig(model=options), core=CORE)
    config = ServerConfig(served_model_name=MODEL)
    with listen("127.0.0.1", port) as sock, open(os.devnull, "w") as nowhere, logs_to(nowhere):
        return serve(sock, lambda: Prepared(config, Tokenizer.load(TOKENIZER), start), config.edge)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None))
