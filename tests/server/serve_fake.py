"""`python -m tests.server.serve_fake PORT LOAD_SECONDS SHUTDOWN_TIMEOUT [CERTFILE KEYFILE]`: server.run.serve with a
fake engine.

The engine needs 20 ms a token and never ends by itself. A prompt of the single token 7 kills it. With a certificate
there is also the API key `secret`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from engine.text import Tokenizer
from engine.types import Request
from server.config import EdgeConfig, ServerConfig
from server.edge.access_log import logs_to
from server.edge.keys import ApiKey
from server.edge.tls import tls_context
from server.run import Prepared, listen, serve
from tests.server.conftest import MIXTRAL
from tests.server.fake_engine import FakeEngine


def main(port: int, load_seconds: float, shutdown_timeout: float, *certificate: Path) -> int:
    async def start() -> FakeEngine:
        await asyncio.sleep(load_seconds)

        def script(request: Request) -> list[int]:
            if request.prompt_ids == (7,):
                asyncio.get_running_loop().call_later(0.1, engine.die, "killed by a test")
            return [5] * 10_000

        engine = FakeEngine(script, step_seconds=0.02)
        return engine

    logging.basicConfig(level=logging.INFO)
    tls = tls_context(*certificate) if certificate else None
    config = ServerConfig(
        served_model_name="fake",
        shutdown_timeout=shutdown_timeout,
        death_grace=0.5,
        edge=EdgeConfig(api_keys=(ApiKey.of("secret"),) if certificate else ()),
    )
    with listen("127.0.0.1", port) as sock, logs_to(sys.stderr):
        return serve(sock, lambda: Prepared(config, Tokenizer.load(MIXTRAL), start), config.edge, tls)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), *map(Path, sys.argv[4:])))
