"""`python -m tests.server.serve_fake PORT LOAD_SECONDS SHUTDOWN_TIMEOUT`: server.run.serve with a fake engine.

The engine needs 20 ms a token and never ends by itself. A prompt of the single token 7 kills it.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from engine.text import Tokenizer
from engine.types import Request
from server.config import ServerConfig
from server.run import Prepared, listen, serve
from tests.server.conftest import MIXTRAL
from tests.server.fake_engine import FakeEngine


def main(port: int, load_seconds: float, shutdown_timeout: float) -> int:
    async def start() -> FakeEngine:
        await asyncio.sleep(load_seconds)

        def script(request: Request) -> list[int]:
            if request.prompt_ids == (7,):
                asyncio.get_running_loop().call_later(0.1, engine.die, "killed by a test")
            return [5] * 10_000

        engine = FakeEngine(script, step_seconds=0.02)
        return engine

    logging.basicConfig(level=logging.INFO)
    config = ServerConfig(served_model_name="fake", shutdown_timeout=shutdown_timeout, death_grace=0.5)
    with listen("127.0.0.1", port) as sock:
        return serve(sock, lambda: Prepared(config, Tokenizer.load(MIXTRAL), start))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
